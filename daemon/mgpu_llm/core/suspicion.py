"""Suspect, then confirm: before a quiet engine is called stalled, look twice where its threads stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from mgpu_llm.core import stacks
from mgpu_llm.core.events import StacksTaken

#: Between the two looks. Python that works is elsewhere after milliseconds; two seconds let a slow step of a busy host end.
APART_S: Final = 2.0
#: A look that has not come by then does not come: whoever takes it is stuck itself. Shorter than the shortest default patience,
#: so that waiting in vain for a look delays no verdict.
LATE_S: Final = 7.0


class Finding(Enum):
    """What has come of a suspicion: not yet anything, nobody can tell, the stacks stand still, or they move."""

    OPEN = "open"
    BLIND = "blind"
    STILL = "still"
    MOVING = "moving"


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """An engine in which nothing moves. `asked_at` is when the last look was asked for, None while none is under way;
    `first` and `last` are the looks that have come; `blind` says why they cannot tell ("" while they may)."""

    since: float
    asked_at: float | None = None
    first: StacksTaken | None = None
    last: StacksTaken | None = None
    finding: Finding = Finding.OPEN
    blind: str = ""


def raised(at: float, *, may_look: bool) -> Suspicion:
    """Nothing has moved for the whole patience. `may_look`: the admin lets us look at stacks."""
    if may_look:
        return Suspicion(since=at)
    return Suspicion(since=at, finding=Finding.BLIND, blind="heartbeat.stacks is false")


def look_is_due(suspicion: Suspicion, at: float) -> bool:
    """Whether the next look is to be asked for now."""
    if suspicion.finding is not Finding.OPEN or suspicion.asked_at is not None:
        return False
    return suspicion.first is None or at - suspicion.first.at >= APART_S


def asked(suspicion: Suspicion, at: float) -> Suspicion:
    """A look has been asked for."""
    return replace(suspicion, asked_at=at)


def after_look(suspicion: Suspicion, look: StacksTaken) -> Suspicion:
    """Fold in what was seen, if it was asked for. The second look decides."""
    if suspicion.finding is not Finding.OPEN or suspicion.asked_at is None:
        return suspicion
    seen = replace(suspicion, last=look, asked_at=None)
    if suspicion.first is None:
        return replace(seen, first=look)
    still = stacks.standing_still(suspicion.first, look)
    if still is False:
        return replace(seen, finding=Finding.MOVING)
    unseen = suspicion.first.unobserved or look.unobserved
    if stopped := stacks.stopped(look.stacks):
        # Whoever stopped it may let it go on: a debugger, a snapshot, a paused container.
        unseen = f"{', '.join(stopped)} is stopped by a signal; kill -CONT continues it"
    if still is None or unseen:
        return replace(seen, finding=Finding.BLIND, blind=unseen or "no thread shows any Python frames")
    return replace(seen, finding=Finding.STILL)


def after_waiting(suspicion: Suspicion, at: float) -> Suspicion:
    """Give up on a look that is late."""
    late = suspicion.asked_at is not None and at - suspicion.asked_at > LATE_S
    if suspicion.finding is not Finding.OPEN or not late:
        return suspicion
    return replace(suspicion, finding=Finding.BLIND, blind=f"no answer within {LATE_S:g} s")
