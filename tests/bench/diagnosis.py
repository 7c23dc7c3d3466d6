"""How often a failure is diagnosed with its cause, and what becomes of it, over all excerpts and recordings.

    make bench-diagnosis          prints the table, and writes it to docs/diagnosis.md

Each excerpt (tests/data/excerpts) and each recorded start that failed (tests/data/recordings) is read by the core as the daemon
would. "Unknown" is a diagnosis that names no cause of its own: engine-exited, died-while-serving, stalled-in-PHASE. From there on
it fails in the same way until it is cured or given up (tests/bench/struggle.py). Ends with 1 if fewer than 95 % are right.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

from mgpu_llm.core import diagnosis, progress, recorded_policy, recording, supervisor
from mgpu_llm.core.diagnosis import Clue, Diagnosis, of_exit
from mgpu_llm.core.recording import Recording
from mgpu_llm.core.states import Killing, Starting, State
from tests.bench import struggle
from tests.bench.struggle import Failure, Struggle
from tests.support import excerpts, recordings

BAR: Final = 0.95
MARK: Final = "<!-- table -->"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One failure: the cause that people gave it, the one that was diagnosed, and what becomes of it, once for each thing that
    it may really be (tests/data/excerpts/cures.toml)."""

    name: str
    cause: str
    found: str
    struggles: tuple[Struggle, ...]

    @property
    def right(self) -> bool:
        return self.found == self.cause

    @property
    def unknown(self) -> bool:
        return not self.right and _is_unknown(self.found)

    @property
    def wrong(self) -> bool:
        return not self.right and not _is_unknown(self.found)

    @property
    def cured(self) -> bool:
        """Whether the first thing done about it is among what cures it."""
        return any(one.at_once for one in self.struggles)

    @property
    def ended_wrongly(self) -> bool:
        return any(one.wrong for one in self.struggles)


@cache
def cases() -> tuple[Case, ...]:
    """All of them."""
    said = [excerpt for excerpt in excerpts.quoted() if not excerpt.near and excerpt.cause]
    found = [_case(f"{one.row}: {one.origin}", one.row, one.cause, excerpts.diagnose(one)) for one in said]
    found += [
        _case(f"recorded: {name}", one.row, one.cause, excerpts.diagnose(one), served=one.served)
        for name, one in excerpts.recorded().items()
    ]
    found += [
        _case(f"{one.row}: {one.origin}", "" if one.near else one.row, one.cause, _of_stall(one))
        for one in excerpts.stalls()
    ]
    found += [
        _case(name, "", known.cause, _verdict(recordings.load(name)))
        for name, known in recordings.expected().items()
        if known.cause is not None and name in recordings.names()
    ]
    return tuple(found)


def table(all_cases: Iterable[Case]) -> str:
    """Causes, how often each was there, what was said of it and what became of it, as a Markdown table."""
    by_cause = defaultdict[str, list[Case]](list)
    for case in all_cases:
        by_cause[case.cause].append(case)
    everything = [case for of_cause in by_cause.values() for case in of_cause]
    head = [
        "cause",
        "failures",
        "detected",
        "unknown",
        "wrong",
        "right cure",
        "attempts until READY or stop",
        "ended wrongly",
    ]
    rows = [_row(cause, by_cause[cause], _ends(by_cause[cause])) for cause in sorted(by_cause)]
    return "\n".join([_line(head), _line(["---"] * len(head)), *rows, _row("all", everything, "")])


def bad_ends(all_cases: Iterable[Case]) -> dict[str, int]:
    """Each way of ending wrongly, or of coming to service at too high a price, and how many failures end so."""
    found = Counter[str]()
    for case in all_cases:
        found.update({f"{case.cause}: {one.wrong or one.dear}" for one in case.struggles if one.wrong or one.dear})
    return dict(sorted(found.items()))


def page_part(all_cases: Sequence[Case]) -> list[str]:
    """What the page has from MARK on."""
    bad = [f"- {why} ({_failures(count)})" for why, count in bad_ends(all_cases).items()]
    in_vain = Counter(f"- {one.cause} ({one.name})" for one in all_cases if not one.cured)
    missed = [f"- {one.name} is {one.cause}, and was called {one.found}" for one in all_cases if not one.right]
    return [
        *(MARK, table(all_cases)),
        *("", "Ended wrongly, or in service at too high a price:", "", *(bad or ["- none"])),
        *("", "What is done first is no cure:", "", *(in_vain or ["- none"])),
        *("", "Called otherwise:", "", *(missed or ["- none"])),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help=f"a Markdown file, whose part from the line {MARK} on is replaced")
    given = parser.parse_args()
    found = cases()
    lines = page_part(found)
    print("\n".join(lines[1:]))
    if given.write is not None:
        before = given.write.read_text(encoding="utf-8").partition(MARK)[0]
        given.write.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")
    right = sum(case.right for case in found) / len(found)
    print(f"{right:.1%} right, {sum(case.wrong for case in found)} wrong; the bar is {BAR:.0%}", file=sys.stderr)
    return 0 if right >= BAR else 1


def _of_stall(stall: excerpts.Stall) -> Diagnosis:
    return diagnosis.of_stall(stall.stalled, Clue())


def _verdict(recorded: Recording) -> Diagnosis:
    """The recording's diagnosis, as core/replay comes to it, with what the decision needs. Where the engine has said why it
    fails and the recording only ends before its process does, it is taken to end."""
    policy = recorded_policy.policy_of(recorded)
    run = recorded_policy.run_of(recorded, policy)
    last = Starting(run=run, since=0.0, progress=progress.begin(0.0, policy.weights_bytes))
    state: State = last
    at = 0.0
    for event in recording.events(recorded, attempt=run.attempt):
        at = max(at, event.at)
        state, _ = supervisor.step(state, replace(event, at=at), policy)
        if not isinstance(state, Starting):
            break
        last = state
    if isinstance(state, Killing) and (found := state.run.ended[-1].diagnosis) is not None:
        return found
    return of_exit(1, last.progress.phase, last.clue, retries=1)


def _case(name: str, row: str, cause: str, found: Diagnosis, *, served: bool = False) -> Case:
    ways = excerpts.cures().of(name, row, cause)
    failure = Failure(found=found, ways=ways, served=served)
    return Case(name=name, cause=cause, found=found.cause, struggles=struggle.struggles(failure))


def _row(cause: str, of_cause: Sequence[Case], ends: str) -> str:
    counts = [sum(values) for values in zip(*((c.right, c.unknown, c.wrong, c.cured) for c in of_cause), strict=True)]
    wrongly = sum(case.ended_wrongly for case in of_cause)
    return _line([cause, str(len(of_cause)), *map(str, counts), ends, str(wrongly)])


def _ends(of_cause: Iterable[Case]) -> str:
    """All right ends in a few words."""
    ended = [one for case in of_cause for one in case.struggles if not one.wrong]
    served = [one.attempts for one in ended if one.status is None]
    return "; ".join([*([_span(served)] if served else []), *_stops(one for one in ended if one.status is not None)])


def _stops(stopped: Iterable[Struggle]) -> Iterator[str]:
    attempts = defaultdict[tuple[int | None, bool], list[Struggle]](list)
    for one in stopped:
        attempts[one.status, one.released is not None].append(one)
    for (status, needs), ones in sorted(attempts.items(), key=str):
        said = f"stop ({status}) after {_span([one.attempts for one in ones])}"
        with_it = _span([one.released for one in ones if one.released is not None]) if needs else ""
        yield f"{said}: needs ladder.may_change, with it {with_it}" if needs else said


def _failures(count: int) -> str:
    return "1 failure" if count == 1 else f"{count} failures"


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least}-{most}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_unknown(cause: str) -> bool:
    return cause in ("", "engine-exited", "died-while-serving") or cause.startswith("stalled-in-")


if __name__ == "__main__":
    sys.exit(main())
