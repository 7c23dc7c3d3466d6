"""What a cause wants, in terms of the ladder that there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mgpu_llm.core.ladder import Kind
from mgpu_llm.core.signatures import Want

#: Every rung of the built-in ladder, in its default order: for causes that do not point to one of them.
ANY_RUNG: Final = frozenset({Kind.TRANSPORT, Kind.MEMORY, Kind.GPUS})
NO_RUNG: Final[frozenset[Kind]] = frozenset()

#: The kind of rung that gives it. Peer-to-peer off switches vLLM's own all-reduce off as well. What is not here no rung gives.
_KINDS: Final[Mapping[Want, Kind]] = {
    Want.TRANSPORT: Kind.TRANSPORT,
    Want.CUSTOM_ALL_REDUCE: Kind.TRANSPORT,
    Want.MEMORY_LOWER: Kind.MEMORY,
    Want.FEWER_GPUS: Kind.GPUS,
}


@dataclass(frozen=True, kw_only=True)
class Cures:
    """The kinds of rungs that may help, how often the same rung is worth another try, and whether all is in vain."""

    kinds: frozenset[Kind]
    plain_retries: int
    hopeless: bool


def of(wants: Iterable[Want]) -> Cures:
    """What the ladder can do of what is wanted. Where it can do nothing, no retry helps until somebody changes something."""
    asked = tuple(wants)
    kinds = frozenset(_KINDS[want] for want in asked if want in _KINDS)
    retries = asked.count(Want.PLAIN_RETRY)
    return Cures(kinds=kinds, plain_retries=retries, hopeless=Want.STOP in asked or not (kinds or retries))
