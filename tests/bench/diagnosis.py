"""How often a failure is diagnosed with its cause, and answered with what cures it, over all excerpts and recordings.

    python -m tests.bench.diagnosis       prints the table

Each excerpt (tests/data/excerpts) and each recorded start that failed (tests/data/recordings) is read by the core as the daemon
would. "Unknown" is a diagnosis that names no cause of its own: engine-exited, died-while-serving, stalled-in-PHASE. Ends with 1
if fewer than 95 % are right.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mgpu_llm.core import diagnosis, replay
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from tests.support import excerpts, recordings

BAR: Final = 0.95


@dataclass(frozen=True, kw_only=True)
class Case:
    """One failure: the cause that people gave it, the one that was diagnosed, and whether what would be done first is among what
    cures that cause (tests/data/excerpts/cures.toml)."""

    name: str
    cause: str
    found: str
    cured: bool

    @property
    def right(self) -> bool:
        return self.found == self.cause

    @property
    def unknown(self) -> bool:
        return not self.right and _is_unknown(self.found)

    @property
    def wrong(self) -> bool:
        return not self.right and not _is_unknown(self.found)


def cases() -> tuple[Case, ...]:
    """All of them."""
    said = [excerpt for excerpt in excerpts.quoted() if not excerpt.near and excerpt.cause]
    found = [_case(f"{one.row}: {one.origin}", one.cause, excerpts.diagnose(one)) for one in said]
    for name, one in excerpts.recorded().items():
        found.append(_case(f"recorded: {name}", one.cause, excerpts.diagnose(one)))
    found += [
        _case(f"{one.row}: {one.origin}", one.cause, diagnosis.of_stall(one.stalled, Clue()))
        for one in excerpts.stalls()
    ]
    return (*found, *_recordings())


def table(all_cases: Iterable[Case]) -> str:
    """Causes, how often each was there, and what was said of it, as a Markdown table."""
    by_cause = defaultdict[str, list[Case]](list)
    for case in all_cases:
        by_cause[case.cause].append(case)
    rows = [_row(cause, by_cause[cause]) for cause in sorted(by_cause)]
    everything = [case for of_cause in by_cause.values() for case in of_cause]
    head = ["| cause | failures | detected | unknown | wrong | right cure |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows, _row("all", everything)])


def main() -> int:
    found = cases()
    print(table(found))
    for case in found:
        if not case.right:
            print(f"{case.name}: is {case.cause}, was called {case.found}")
    right = sum(case.right for case in found) / len(found)
    print(f"{right:.1%} right, {sum(case.wrong for case in found)} wrong; the bar is {BAR:.0%}")
    return 0 if right >= BAR else 1


def _recordings() -> list[Case]:
    found = list[Case]()
    for name, expected in recordings.expected().items():
        if expected.cause is not None and name in recordings.names():
            report = replay.judge(recordings.load(name))
            told = Diagnosis(cause=report.cause or "", outcome=report.outcome, summary="", advice=report.advice)
            found.append(_case(name, expected.cause, told))
    return found


def _case(name: str, cause: str, found: Diagnosis) -> Case:
    return Case(
        name=name, cause=cause, found=found.cause, cured=_first_want(found) in excerpts.cures().get(cause, ("",))
    )


def _first_want(found: Diagnosis) -> str:
    """What the row behind the diagnosis would change first; "" where no row is behind it."""
    rows = (row for row in diagnosis.TABLE if row.reported_as == found.cause and row.advice == found.advice)
    return next((row.wants[0].value for row in rows if row.wants), "")


def _row(cause: str, of_cause: list[Case]) -> str:
    counts = [sum(values) for values in zip(*((c.right, c.unknown, c.wrong, c.cured) for c in of_cause), strict=True)]
    return f"| {cause} | {len(of_cause)} | {' | '.join(map(str, counts))} |"


def _is_unknown(cause: str) -> bool:
    return cause in ("", "engine-exited", "died-while-serving") or cause.startswith("stalled-in-")


if __name__ == "__main__":
    sys.exit(main())
