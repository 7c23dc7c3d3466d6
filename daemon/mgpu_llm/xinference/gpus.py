"""Which GPUs a launch would use, over how many the model is split, and how much of their memory is taken."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from mgpu_llm.xinference.command import Asked, Given
from mgpu_llm.xinference.findings import Argument, Finding, Key, Left, Remark, Same

#: Options that multiply the ranks of tensor parallelism.
MULTIPLIERS: Final = ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size")
#: What is decided here, and not one option at a time.
DECIDED: Final = ("tensor_parallel_size", "gpu_memory_utilization", *MULTIPLIERS)
_SAFE_UTILISATION: Final = 0.90
_MOST: Final = 1024
Gpus = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The GPUs and why; none at all is "none". `open`: the command named none, so that there may be more of them."""

    gpus: Gpus
    why: str
    open: bool = False


def gpu_findings(asked: Asked, env: Mapping[str, str]) -> Iterator[Finding]:
    """The table [gpus], and the parallel sizes among engine.args. `env` is what stood before the command."""
    visible = yield from _visible(env)
    choice = yield from _chosen(asked, visible)
    choice = yield from _first_replica(asked, choice)
    sizes = yield from _sizes(asked)
    yield from _spread(asked, choice, sizes)
    yield from _utilisation(asked.engine.get("gpu_memory_utilization"))


def _visible(env: Mapping[str, str]) -> Generator[Finding, None, Choice | None]:
    """What CUDA_VISIBLE_DEVICES leaves, None where it says nothing."""
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None or value == "all":
        return None
    what = f"CUDA_VISIBLE_DEVICES={value}"
    if value.strip() in ("", "-1", "none"):
        return Choice(gpus=(), why=what)
    gpus = _gpus(value)
    if not gpus:
        yield Left(what=what, why="neither indices nor UUIDs of whole GPUs; set gpus.use")
        return None
    return Choice(gpus=gpus, why=what)


def _gpus(text: str) -> Gpus:
    """Indices or UUIDs, each once; () where anything else is in it."""
    parts = [part.strip() for part in text.split(",")]
    if all(re.fullmatch(r"\d{1,4}", part, re.ASCII) for part in parts):
        return tuple(dict.fromkeys(int(part) for part in parts))
    return tuple(dict.fromkeys(parts)) if all(re.fullmatch(r"GPU-[0-9a-f][0-9a-f-]*", part) for part in parts) else ()


def _chosen(asked: Asked, visible: Choice | None) -> Generator[Finding, None, Choice]:
    indices, count = asked.options.get("gpu-idx"), asked.options.get("n-gpu")
    if indices is not None:
        gpus = _gpus(indices.value)
        if gpus and all(isinstance(gpu, int) for gpu in gpus):
            yield from _beside_indices(count, gpus, visible)
            return Choice(gpus=gpus, why=indices.text)
        yield Left(what=indices.text, why='it is no list of indices such as "2,3"; set gpus.use')
    if count is None or count.value.lower() == "auto":
        return (yield from _automatic(count, visible))
    if count.value.lower() == "none":
        return Choice(gpus=(), why=count.text)
    if not re.fullmatch(r"0*[1-9]\d{0,2}", count.value, re.ASCII):
        yield Left(what=count.text, why='it is neither "auto", "none" nor a number of GPUs; set gpus.use')
        return (yield from _automatic(None, visible))
    return (yield from _counted(count, int(count.value), visible))


def _beside_indices(count: Given | None, gpus: Gpus, visible: Choice | None) -> Iterator[Finding]:
    if count is not None and count.value in (str(len(gpus)), "auto"):
        yield Same(what=count.text)
    elif count is not None:
        yield Left(what=count.text, why="beside --gpu-idx Xinference ignores it, too")
    if visible is not None and not set(gpus) <= set(visible.gpus):
        yield Left(what=visible.why, why="--gpu-idx names other GPUs, and it counts as nvidia-smi does")


def _automatic(count: Given | None, visible: Choice | None) -> Generator[Finding, None, Choice]:
    if count is not None:
        yield Same(what=count.text)
    if visible is not None:
        if len(visible.gpus) > 1:
            text = (
                f"all of {visible.why}; Xinference by itself takes one GPU where neither --n-gpu nor --gpu-idx is given"
            )
            yield Remark(about="gpus.use", text=text)
        return visible
    yield Remark(about="gpus.use", text="Xinference takes the first GPU that is free; see in nvidia-smi which it is")
    return Choice(gpus=(0,), why="neither --gpu-idx nor a number: Xinference takes one GPU", open=True)


def _counted(count: Given, number: int, visible: Choice | None) -> Generator[Finding, None, Choice]:
    if visible is None:
        yield Remark(about="gpus.use", text=f"Xinference takes the first {number} that are free; see nvidia-smi")
        return Choice(gpus=tuple(range(number)), why=count.text)
    if number > len(visible.gpus):
        yield Left(what=count.text, why=f"{visible.why} leaves {len(visible.gpus)}")
        return visible
    return Choice(gpus=visible.gpus[:number], why=f"{visible.why}, {count.text}")


def _first_replica(asked: Asked, choice: Choice) -> Generator[Finding, None, Choice]:
    given = asked.options.get("replica")
    if given is None or given.value == "1":
        yield from () if given is None else (Same(what=given.text),)
        return choice
    if not re.fullmatch(r"0*[1-9]\d{0,3}", given.value, re.ASCII):
        yield Left(what=given.text, why="it is no number of replicas")
        return choice
    # Xinference deals --gpu-idx out like cards (core/utils.py, assign_replica_gpu).
    dealt = "gpu-idx" in asked.options and len(choice.gpus) > 1
    own = choice.gpus[:: int(given.value)] if dealt else choice.gpus
    others = [str(gpu) for gpu in choice.gpus if gpu not in own]
    rest = f" GPUs {', '.join(others)} are left for the others" if others else ""
    yield Left(
        what=given.text,
        why="a daemon runs one engine, and this is the first: start another daemon for each more, with GPUs and port of its own, "
        f"or give vLLM --data-parallel-size.{rest}",
    )
    return replace(choice, gpus=own, why=f"{choice.why}, the first of {given.text}") if dealt else choice


def _sizes(asked: Asked) -> Generator[Finding, None, dict[str, int]]:
    sizes = dict[str, int]()
    for name in ("tensor_parallel_size", *MULTIPLIERS):
        given = asked.engine.get(name)
        if given is None:
            continue
        if given.value == "None":
            yield Same(what=given.text)
        elif re.fullmatch(r"0*[1-9]\d{0,2}", given.value, re.ASCII):
            sizes[name] = int(given.value)
        else:
            yield Left(what=given.text, why="it is no number of parts; vLLM would refuse it")
    return sizes


def _spread(asked: Asked, choice: Choice, sizes: dict[str, int]) -> Iterator[Finding]:
    """One GPU for each rank, which is what mgpud asks for as well."""
    asked_for, times = sizes.get("tensor_parallel_size"), prod(sizes.get(name, 1) for name in MULTIPLIERS)
    ranks = (asked_for or 1) * times
    if choice.open and 1 < ranks <= _MOST:
        choice = replace(choice, gpus=tuple(range(ranks)), why=f"so many ranks: {_texts(asked, sizes)}")
    there = len(choice.gpus)
    if there and there % times:
        yield from (_no_room(asked.engine[name], times, there) for name in MULTIPLIERS if name in sizes)
        sizes, times = {name: size for name, size in sizes.items() if name not in MULTIPLIERS}, 1
    if there and asked_for is not None and asked_for * times > there:
        yield _no_room(asked.engine["tensor_parallel_size"], asked_for * times, there)
        asked_for = None
    yield from _use(choice)
    if asked_for is not None and asked_for != (there or 1):
        text = asked.engine["tensor_parallel_size"].text
        yield Key(table="gpus", name="tensor_parallel", value=asked_for, why=(text,))
    elif asked_for is not None:
        yield Same(what=asked.engine["tensor_parallel_size"].text)
    elif there and times > 1:
        why = f"{there} GPUs, {_texts(asked, {name: 0 for name in sizes if name in MULTIPLIERS})}"
        yield Key(table="gpus", name="tensor_parallel", value=there // times, why=(why,))
    for name in MULTIPLIERS:
        if sizes.get(name, 1) > 1:
            option = f"--{name.replace('_', '-')}"
            yield Argument(words=(option, str(sizes[name])), why=asked.engine[name].text)
        elif name in sizes:
            yield Same(what=asked.engine[name].text)


def _texts(asked: Asked, sizes: Mapping[str, int]) -> str:
    return ", ".join(asked.engine[name].text for name in sorted(sizes))


def _no_room(given: Given, ranks: int, there: int) -> Left:
    return Left(
        what=given.text, why=f"it does not fit {there} GPU{'s' if there > 1 else ''}, {ranks} ranks need one each"
    )


def _use(choice: Choice) -> Iterator[Finding]:
    if not choice.gpus:
        yield Key(table="gpus", name="use", value="none", why=(choice.why,))
        return
    why = [f"{choice.why}; indices are those of nvidia-smi" if isinstance(choice.gpus[0], int) else choice.why]
    if len(choice.gpus) > 1:
        first = choice.gpus[0] if isinstance(choice.gpus[0], int) else f'"{choice.gpus[0]}"'
        why += [f"if the model fits on one of them, begin with use = [{first}]: one GPU has no peer to wait for"]
    yield Key(table="gpus", name="use", value=choice.gpus, why=tuple(why))


def _utilisation(given: Given | None) -> Iterator[Finding]:
    if given is None:
        return
    try:
        value = round(float(given.value), 4)
    except ValueError:
        value = _SAFE_UTILISATION if given.value == "None" else 0.0
    if value == _SAFE_UTILISATION:
        yield Same(what=given.text)
        return
    if not 0 < value <= 1:
        yield Left(what=given.text, why="it is no fraction above 0 and up to 1; 0.90 is the default")
        return
    why = [given.text]
    if value > _SAFE_UTILISATION:
        why += ["0.90 is safer: what is left to NCCL and CUDA graphs is small above it; the ladder lowers it in steps"]
        text = f"{value:g} as asked; 0.90 is safer, and the ladder goes down from there where the load fails"
        yield Remark(about="gpus.memory_utilisation", text=text)
    yield Key(table="gpus", name="memory_utilisation", value=value, why=tuple(why))
