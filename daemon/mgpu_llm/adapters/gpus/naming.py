"""The GPUs that an operator means."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mgpu_llm.adapters.gpus.told import Gpu


def resolve(wanted: Literal["all"] | Sequence[int | str], inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs that `wanted` names, in its order: "all", or indices and UUIDs ("GPU-..." or, as in CUDA, a unique
    beginning of one). `inventory` is the whole of the host.

    Raises ValueError with one line that names all that is wrong.
    """
    if wanted == "all":
        return tuple(inventory)
    matches = {name: _matching(name, inventory) for name in wanted}
    missing = [name for name, found in matches.items() if not found]
    problems = [f"no GPU {_spoken(missing)}: this host has {_describe(inventory)}"] if missing else []
    problems += [_not_one(name, found) for name, found in matches.items() if len(found) > 1]
    chosen = [(name, matches[name][0]) for name in wanted if len(matches[name]) == 1]
    for gpu in inventory:
        names = [name for name, choice in chosen if choice is gpu]
        if len(names) > 1:
            problems.append(f"GPU {gpu.index} is named {len(names)} times ({_spoken(names)})")
    if any(str(name).startswith("MIG-") for name in missing):
        problems.append("a MIG slice cannot be used, name whole GPUs")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(gpu for _, gpu in chosen)


def _matching(name: int | str, inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    if isinstance(name, int):
        return tuple(gpu for gpu in inventory if gpu.index == name)
    if not name.startswith("GPU-"):
        return ()
    whole = tuple(gpu for gpu in inventory if gpu.uuid == name)
    return whole or tuple(gpu for gpu in inventory if gpu.uuid.startswith(name))


def _not_one(name: int | str, found: Sequence[Gpu]) -> str:
    return (
        f'"{name}" begins the UUID of {len(found)} GPUs ({", ".join(str(gpu.index) for gpu in found)}), give more of it'
    )


def _spoken(names: Sequence[int | str]) -> str:
    quoted = [str(name) if isinstance(name, int) else f'"{name}"' for name in names]
    return " and ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


def _describe(inventory: Sequence[Gpu]) -> str:
    if not inventory:
        return "none"
    first, last = inventory[0].index, inventory[-1].index
    kinds = Counter(gpu.name for gpu in inventory)
    span = str(first) if first == last else f"{first}-{last}"
    return f"{span} ({', '.join(f'{count} x {name}' for name, count in kinds.items())})"
