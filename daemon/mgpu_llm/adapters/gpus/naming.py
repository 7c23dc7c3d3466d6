"""The GPUs that an operator means."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mgpu_llm.adapters.gpus.told import Gpu
from mgpu_llm.core.slices import is_slice


def resolve(wanted: Literal["all"] | Sequence[int | str], inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs that `wanted` names, in its order: "all", which are whole ones, or indices and UUIDs ("GPU-..." and "MIG-..." of a
    slice or, as in CUDA, a unique beginning of one). `inventory` is the whole of the host. A UUID that no GPU tells is taken for
    that of a lost one that cannot tell its own, as long as there is one.

    Raises ValueError with one line that names all that is wrong.
    """
    if wanted == "all":
        return tuple(inventory)
    parts = tuple(part for gpu in inventory for part in _parts(gpu))
    matches = {name: _matching(name, parts if is_slice(name) else inventory) for name in wanted}
    lost = _of_lost(matches, inventory)
    matches |= {name: (gpu,) for name, gpu in lost.items()}
    missing = [name for name, found in matches.items() if not found and not is_slice(name)]
    unknown = [name for name, found in matches.items() if not found and is_slice(name)]
    problems = [f"no GPU {_spoken(missing)}: this host has {_describe(inventory)}"] if missing else []
    problems += [f"no MIG slice {_spoken(unknown)}: this host has {_listed(parts)}"] if unknown else []
    problems += [_not_one(name, found) for name, found in matches.items() if len(found) > 1]
    chosen = [(name, matches[name][0]) for name in wanted if len(matches[name]) == 1]
    for gpu in (*inventory, *parts, *lost.values()):
        names = [name for name, choice in chosen if choice is gpu]
        if len(names) > 1:
            problems.append(f"{_called(gpu)} is named {len(names)} times ({_spoken(names)})")
        if names and gpu.whole and any(choice.uuid == gpu.whole for _, choice in chosen):
            problems.append(f"GPU {gpu.index} is named both whole and by its slice {_spoken(names[:1])}")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(gpu for _, gpu in chosen)


def _parts(gpu: Gpu) -> Iterator[Gpu]:
    """The slices of a GPU that tell who they are, as GPUs."""
    for part in gpu.slices:
        if part.uuid is not None:
            size = part.memory_total_bytes or 0
            yield Gpu(index=gpu.index, uuid=part.uuid, name=gpu.name, memory_total_bytes=size, whole=gpu.uuid)


def _matching(name: int | str, inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    if isinstance(name, int):
        return tuple(gpu for gpu in inventory if gpu.index == name)
    if not name.startswith(("GPU-", "MIG-")):
        return ()
    whole = tuple(gpu for gpu in inventory if gpu.uuid == name)
    return whole or tuple(gpu for gpu in inventory if gpu.uuid.startswith(name))


def _of_lost(matches: Mapping[int | str, tuple[Gpu, ...]], inventory: Sequence[Gpu]) -> dict[int | str, Gpu]:
    """UUIDs that no GPU tells, each with the lost one that it is taken for: for a GPU's there is one each that tells no UUID, and
    slices may all be of one."""
    names = [name for name, found in matches.items() if not found and str(name).startswith(("GPU-", "MIG-"))]
    named = {gpu.index for found in matches.values() for gpu in found}
    lost = [gpu for gpu in inventory if gpu.lost and gpu.index not in named]
    nameless = [gpu for gpu in lost if not gpu.uuid]
    taken = dict(zip([name for name in names if not is_slice(name)], nameless, strict=False))
    divided = [replace(gpu, whole=gpu.uuid or str(gpu.index)) for gpu in lost if gpu not in taken.values()]
    taken |= {name: divided[0] for name in names if divided and is_slice(name)}
    return {
        name: replace(gpu, uuid=str(name), lost=f'{gpu.lost}; no GPU that answers has "{name}"')
        for name, gpu in taken.items()
    }


def _not_one(name: int | str, found: Sequence[Gpu]) -> str:
    kind = "MIG slices" if found[0].whole else "GPUs"
    return f'"{name}" begins the UUID of {len(found)} {kind} ({", ".join(gpu.entry for gpu in found)}), give more of it'


def _called(gpu: Gpu) -> str:
    return f"MIG slice {gpu.uuid}" if gpu.whole else f"GPU {gpu.index}"


def _listed(parts: Sequence[Gpu]) -> str:
    return (
        ", ".join(f"{part.uuid} of GPU {part.index}" for part in parts) or "none (sudo nvidia-smi -mig 1 divides a GPU)"
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
