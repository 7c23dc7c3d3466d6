"""The ladder: how far the settings may be changed from the admin's own, and what a rung of it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from mgpu_llm.core import remedies
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy

BASE_NAME: Final = "base"
#: More are none of ours: there are not so many kinds.
MOST_REMEDIES: Final = 64
MOST_TOKENS: Final = 1_000_000_000
_PARTS: Final = re.compile(
    r"utilisation-(?P<part>0\.[0-9]{2,4}|1\.00)|tp-(?P<count>[0-9]{1,4})|gpus-(?P<gpus>\S+)|context-(?P<tokens>[0-9]{1,9})"
)


class Nvlink(StrEnum):
    """Which pairs of the GPUs have NVLink between them. Where nobody knows it counts as none."""

    NONE = "none"
    SOME = "some"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The remedies that are taken together, in the order in which they came. Without any it is the base: the admin's own."""

    remedies: tuple[Remedy, ...] = ()

    @property
    def name(self) -> str:
        return "+".join(remedy.name for remedy in self.remedies) or BASE_NAME

    @property
    def cost(self) -> str:
        return "; ".join(remedy.cost for remedy in self.remedies)

    def plus(self, remedy: Remedy) -> Rung:
        return Rung(remedies=(*(other for other in self.remedies if not remedy.replaces(other)), remedy))


BASE: Final = Rung()


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What there is to choose from. `sizes` are the smaller numbers of ranks that vLLM accepts for the model and that hold its
    weights, largest first, and `no_sizes` says why others are none; below the utilisation in `lowest`, by number of ranks,
    weights and cache do not fit; `spares` are GPUs beside the base's that may stand in. `context` is the context length in
    tokens, `pipeline_parallel` how often the GPUs of one layer are needed. `own` are the admin's own rungs, which replace
    everything else."""

    base: Launch
    areas: frozenset[Area] = BY_DEFAULT
    sizes: tuple[int, ...] = ()
    no_sizes: str = ""
    lowest: Mapping[int, float] = field(default_factory=dict)
    step: float = 0.05
    floor: float = 0.7
    ceiling: float = 0.95
    nvlink: Nvlink = Nvlink.NONE
    spares: tuple[str, ...] = ()
    context: int | None = None
    one_host: bool = True
    pipeline_parallel: int = 1
    own: tuple[Remedy, ...] | None = None

    def launch(self, rung: Rung) -> Launch:
        """The whole launch of a rung."""
        launch = self.base
        for remedy in rung.remedies:
            launch = remedy.over(launch)
        return launch

    def rung(self, name: str) -> Rung:
        """The rung of that name. Raises ValueError where this ladder has none, and for one that would change what it may not."""
        parts = name.split("+") if name != BASE_NAME else []
        if len(parts) > MOST_REMEDIES or len(set(parts)) < len(parts):
            raise ValueError(f'there is no rung "{name[:80]}"')
        found = BASE
        for part in parts:
            found = found.plus(self._remedy(part))
        return found

    def _remedy(self, name: str) -> Remedy:
        if self.own is not None:
            found = next((remedy for remedy in self.own if remedy.name == name), None)
        else:
            found = remedies.FIXED.get(name) or self._made(name)
        if found is None:
            raise ValueError(f'there is no rung "{name}"')
        if found.area is not None and found.area not in self.areas:
            raise ValueError(f'rung "{name}" changes what must not be changed: {found.area}')
        return found

    def _made(self, name: str) -> Remedy | None:
        if (match := _PARTS.fullmatch(name)) is None:
            return None
        part, count, gpus, tokens = match.group("part", "count", "gpus", "tokens")
        if part and self.base.utilisation is not None and self._within(value := float(part)):
            return remedies.utilisation(value, raises=value > self.base.utilisation)
        if count and int(count) in self.sizes:
            return remedies.gpus(
                None if self.base.gpus is None else self.base.gpus[: int(count)], int(count), self.base
            )
        chosen = tuple((gpus or "").split(","))
        if set(chosen) <= {*(self.base.gpus or ()), *self.spares} and len(set(chosen)) == len(chosen):
            if len(chosen) == len(self.base.gpus or ()):
                return remedies.gpus(chosen, self.base.tensor_parallel, self.base)
            if len(chosen) in self.sizes:
                return remedies.gpus(chosen, len(chosen), self.base)
        if tokens and 0 < int(tokens) < (self.context or MOST_TOKENS):
            return remedies.context(int(tokens))
        return None

    def _within(self, utilisation: float) -> bool:
        """Whether the utilisation may be so, by the bounds or because the admin's own is beyond them."""
        base = self.base.utilisation or 0.0
        return min(self.floor, base) <= utilisation <= max(self.ceiling, base)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of the model, None where its config.json cannot be read beforehand."""

    attention: int | None = None
    key_value: int | None = None


def smaller(tensor_parallel: int, heads: Heads) -> tuple[int, ...]:
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
