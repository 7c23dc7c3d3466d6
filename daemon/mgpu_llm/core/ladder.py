"""The ladder: the settings to fall back to, from the admin's own to the most cautious, each rung on top of the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from mgpu_llm.core import launch as launches
from mgpu_llm.core.launch import Launch


class Kind(StrEnum):
    """What a rung changes, so that a cause can ask for the rungs that cure it."""

    BASE = "base"
    TRANSPORT = "transport"
    MEMORY = "memory"
    GPUS = "gpus"
    CUSTOM = "custom"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A named change of settings; `launch` is the whole result, with the rungs above it included."""

    name: str
    kind: Kind
    launch: Launch
    cost: str = ""


@dataclass(frozen=True, kw_only=True)
class CustomRung:
    """A rung as the admin wrote it in `[[ladder]]`. `gpus` is how many of the configured GPUs to keep."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    utilisation: float | None = None
    gpus: int | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of the model, None where its config.json cannot be read beforehand."""

    attention: int | None = None
    key_value: int | None = None


BASE: Final = "base"
P2P_OFF_ENV: Final[Mapping[str, str]] = {"NCCL_P2P_DISABLE": "1"}
#: vLLM's own all-reduce does peer access too, and since 0.11.0 it does not test it first: NCCL's switch alone is not enough.
P2P_OFF_ARGS: Final = ("--disable-custom-all-reduce",)
P2P_OFF_COST: Final = (
    "GPUs talk through host memory: about a tenth of the all-reduce bandwidth on NVLink "
    "(255 -> 25.6 GiB/s on two H200s), less loss on PCIe"
)


def built_in(base: Launch, heads: Heads, *, step: float, floor: float, pipeline_parallel: int = 1) -> tuple[Rung, ...]:
    """The default ladder: base, P2P off, lower utilisation by `step` down to `floor`, fewer GPUs; cumulative.

    P2P off is left out where there is one rank only. Fewer GPUs go over the sizes that divide the model's heads, and are
    left out with pipeline parallelism, where the number of GPUs does not follow from tensor parallelism alone.
    """
    rungs = [Rung(name=BASE, kind=Kind.BASE, launch=base)]
    if base.tensor_parallel * pipeline_parallel > 1:
        changed = launches.with_changes(base, env=P2P_OFF_ENV, args=P2P_OFF_ARGS)
        if changed != base:
            rungs.append(Rung(name="p2p-off", kind=Kind.TRANSPORT, launch=changed, cost=P2P_OFF_COST))
    for value in _lower(base.utilisation, step, floor):
        rungs.append(
            Rung(
                name=f"utilisation-{value:.2f}",
                kind=Kind.MEMORY,
                launch=launches.with_changes(rungs[-1].launch, utilisation=value),
                cost="less GPU memory for the KV cache: fewer tokens in flight",
            )
        )
    for count in fewer(base.tensor_parallel, heads) if pipeline_parallel == 1 else ():
        rungs.append(
            Rung(
                name=f"tp-{count}",
                kind=Kind.GPUS,
                launch=launches.with_changes(rungs[-1].launch, gpu_count=count),
                cost=f"{count} of {base.tensor_parallel} GPUs do all the work: slower, and less room for the KV cache",
            )
        )
    return tuple(rungs)


def from_config(base: Launch, entries: Sequence[CustomRung]) -> tuple[Rung, ...]:
    """The admin's own ladder under the base, cumulative in the order written."""
    rungs = [Rung(name=BASE, kind=Kind.BASE, launch=base)]
    for entry in entries:
        changed = launches.with_changes(
            rungs[-1].launch, env=entry.env, args=entry.args, utilisation=entry.utilisation, gpu_count=entry.gpus
        )
        rungs.append(Rung(name=entry.name, kind=Kind.CUSTOM, launch=changed, cost="as set by the config"))
    return tuple(rungs)


def fewer(tensor_parallel: int, heads: Heads) -> tuple[int, ...]:
    """Smaller tensor-parallel sizes that vLLM accepts for the model, largest first. Unknown heads: its divisors, which
    divide the heads of every model that the larger size divided."""
    sizes = range(tensor_parallel - 1, 0, -1)
    if heads.attention is None:
        return tuple(size for size in sizes if tensor_parallel % size == 0)
    return tuple(size for size in sizes if splits(size, heads))


def splits(tensor_parallel: int, heads: Heads) -> bool:
    """Whether vLLM can split the heads over so many ranks: attention heads evenly, key/value heads evenly or repeated."""
    if heads.attention is not None and heads.attention % tensor_parallel:
        return False
    if heads.key_value is None:
        return True
    return heads.key_value % tensor_parallel == 0 or tensor_parallel % heads.key_value == 0


def next_rung(rungs: Sequence[Rung], current: int, cures: frozenset[Kind]) -> int | None:
    """The first rung below `current` that may cure, or None when there is none left. The admin's own rungs always may."""
    for index in range(current + 1, len(rungs)):
        if rungs[index].kind in cures or rungs[index].kind is Kind.CUSTOM:
            return index
    return None


def _lower(utilisation: float | None, step: float, floor: float) -> list[float]:
    values = list[float]()
    while utilisation is not None and round(utilisation - step, 4) >= floor:
        utilisation = round(utilisation - step, 4)
        values.append(utilisation)
    return values
