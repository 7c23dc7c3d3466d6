"""Suspect, then confirm: before a quiet engine is called stalled, look twice where its threads stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from mgpu_llm.core import stacks
from mgpu_llm.core.events import StacksTaken

#: Between two looks that are compared. Python that works is elsewhere after milliseconds; two seconds let a slow step of a
#: busy host end.
APART_S: Final = 2.0
#: Where looks prove nothing, the next one comes so much later: what could not be seen, or stood still, may be otherwise then.
AGAIN_S: Final = 3.0
#: A look that has not come after so much more quiet does not come: whoever takes it is stuck itself. Shorter than the shortest
#: default patience.
LATE_S: Final = 7.0
_NO_FRAMES: Final = "no thread shows any Python frames"


class Finding(Enum):
    """What the last two looks say: not yet anything, nothing that proves anything, the stacks stand still, or they move."""

    OPEN = "open"
    BLIND = "blind"
    STILL = "still"
    MOVING = "moving"


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """An engine in which nothing moves. `asked_at_s` is the quiet at which a look was asked for that has not come yet, None
    without; `last` is the last look that has come, and `next_at` when another is wanted; `blind` says why they prove nothing
    ("" while they may)."""

    since: float
    next_at: float | None = 0.0
    asked_at_s: float | None = None
    last: StacksTaken | None = None
    finding: Finding = Finding.OPEN
    blind: str = ""


def raised(at: float, *, may_look: bool) -> Suspicion:
    """Nothing has moved for the whole patience. `may_look`: the admin lets us look at stacks."""
    if may_look:
        return Suspicion(since=at, next_at=at)
    return Suspicion(since=at, next_at=None, finding=Finding.BLIND, blind="heartbeat.stacks is false")


def look_is_due(suspicion: Suspicion, at: float) -> bool:
    """Whether the next look is to be asked for now."""
    return suspicion.asked_at_s is None and suspicion.next_at is not None and at >= suspicion.next_at


def asked(suspicion: Suspicion, quiet_s: float) -> Suspicion:
    """A look has been asked for."""
    return replace(suspicion, asked_at_s=quiet_s)


def after_look(suspicion: Suspicion, look: StacksTaken, *, gpus_spin: bool = False) -> Suspicion:
    """Fold in what was seen, if it was asked for, and compare it with the look before. `gpus_spin`: every GPU of the launch
    is fully busy, so that a thread which runs in one place waits for its GPU (it spins until a full launch queue has room)."""
    if suspicion.asked_at_s is None:
        return suspicion
    before = suspicion.last
    seen = replace(suspicion, last=look, asked_at_s=None, next_at=look.at + APART_S)
    if before is None:
        seen_any = any(stack.frames for stack in look.stacks)
        return seen if seen_any else _proves_nothing(seen, look.at, look.unobserved or _NO_FRAMES)
    still = stacks.standing_still(before, look)
    if still is False:
        return replace(seen, finding=Finding.MOVING)
    if why := _why_it_proves_nothing(before, look, gpus_spin=gpus_spin):
        return _proves_nothing(seen, look.at, why)
    return _proves_nothing(seen, look.at, _NO_FRAMES) if still is None else replace(seen, finding=Finding.STILL)


def after_waiting(suspicion: Suspicion, quiet_s: float, at: float) -> Suspicion:
    """Give up on a look that is late, by quiet: time in which nobody saw anything holds nothing against anybody."""
    if suspicion.asked_at_s is None or quiet_s - suspicion.asked_at_s <= LATE_S:
        return suspicion
    return _proves_nothing(replace(suspicion, asked_at_s=None), at, f"no answer within {LATE_S:g} s")


def _why_it_proves_nothing(before: StacksTaken, look: StacksTaken, *, gpus_spin: bool) -> str:
    if stopped := stacks.stopped(look.stacks):
        # Whoever stopped it may let it go on: a debugger, a snapshot, a paused container.
        return f"{', '.join(stopped)} is stopped; kill -CONT or a thawed container lets it go on"
    if not gpus_spin and (running := stacks.running(before.stacks, look.stacks)):
        return f"not known to wait for anything, so perhaps at work in native code: {', '.join(running)}"
    return before.unobserved or look.unobserved


def _proves_nothing(suspicion: Suspicion, at: float, why: str) -> Suspicion:
    return replace(suspicion, finding=Finding.BLIND, blind=why, next_at=at + AGAIN_S)
