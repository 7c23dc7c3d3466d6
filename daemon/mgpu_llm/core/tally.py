"""What is counted over a whole life of the daemon: the history of attempts forgets the oldest, a counter must not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mgpu_llm.core.diagnosis import TABLE
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.signatures import Kind, Where
from mgpu_llm.core.states import Ended, Ready, Starting, State, Stopped

#: The cause of an attempt that somebody stopped.
NO_CAUSE: Final = "none"


def _foreseen() -> Iterator[tuple[str, str]]:
    """Outcome and cause of the attempts that may come, but for deaths of every cause."""
    for row in TABLE:
        if row.stall is not None:
            yield "stalled", row.reported_as
        elif row.wants and row.kind is not Kind.LATENT:
            ends = "averted" if row.where is Where.PREFLIGHT else "refused" if Want.STOP in row.wants else "crashed"
            yield ends, row.reported_as
    yield from (("crashed", "engine-exited"), ("crashed", "cannot-spawn"), ("refused", "completion-refused"))
    yield from (("died", "died-while-serving"), ("stopped", NO_CAUSE))


#: Who watches a counter does not see the step from nothing to 1, so they are there from the beginning.
_AT_FIRST: Final = dict.fromkeys(_foreseen(), 0)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Since the daemon began. `ended` counts the attempts that are over by outcome and cause, as core/status.AttemptStatus calls
    them; `starts` the engines that were begun, `services` those that came to service. `wanted_at` is since when the service is
    wanted and not there (None: it is there, or nobody wants it). Of the last load that came to service, `ready_s` is how long it
    took from then on, failed attempts included, and `load_s` how long its own attempt took. `quiet_s` is the longest quiet of the
    last load that is over, whatever became of it. Seconds; None is "not yet"."""

    ended: Mapping[tuple[str, str], int] = field(default_factory=lambda: _AT_FIRST)
    starts: int = 0
    services: int = 0
    wanted_at: float | None = None
    ready_s: float | None = None
    load_s: float | None = None
    quiet_s: float | None = None

    @property
    def deaths(self) -> int:
        """Engines that died while they served."""
        return sum(count for (outcome, _), count in self.ended.items() if outcome == "died")


def stepped(tally: Tally, before: State, after: State, at: float) -> Tally:
    """To be told of every step, at `at` seconds on the clock of the events."""
    told = tally
    if (ended := _newly_ended(before, after)) is not None:
        key = (ended.outcome, NO_CAUSE if ended.diagnosis is None else ended.diagnosis.cause)
        told = replace(told, ended={**told.ended, key: told.ended.get(key, 0) + 1})
    if type(before) is type(after) and before.run.attempt == after.run.attempt:
        return told
    if isinstance(before, Starting):
        told = replace(told, quiet_s=longest_quiet_s(before))
    if isinstance(after, Starting):
        told = replace(told, starts=told.starts + 1)
    return _waited(told, before, after, at)


def longest_quiet_s(state: Starting) -> float:
    """The longest time in which nothing moved, of this load so far."""
    heart = state.progress
    return max(heart.quiet_s, *heart.longest_quiet.values(), 0.0)


def _newly_ended(before: State, after: State) -> Ended | None:
    """The attempt that this step has ended: there is never more than one."""
    last, known = after.run.ended[-1:], before.run.ended[-1:]
    return last[0] if last and (not known or known[0].number != last[0].number) else None


def _waited(tally: Tally, before: State, after: State, at: float) -> Tally:
    if isinstance(after, Stopped):
        return replace(tally, wanted_at=None)
    if isinstance(after, Ready):
        since = at if tally.wanted_at is None else tally.wanted_at
        return replace(
            tally, services=tally.services + 1, wanted_at=None, ready_s=at - since, load_s=at - after.spawned_at
        )
    return replace(tally, wanted_at=at) if isinstance(before, Ready | Stopped) else tally
