"""How soon a stalled start is noticed, and how often a healthy one is killed: our judgement beside the rules of others.

    make bench-heartbeat          prints the table, and writes it to docs/heartbeat.md

Every rule judges the same recorded starts of the real vLLM (tests/data/recordings), as they are and, for healthy ones,
slowed down two and five times. Where a recording of a stall ends, the engine goes on as it was: nothing new, and what it
repeated it repeats at the same pace. Ends with 1 if ours kills a healthy start or misses its goal.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mgpu_llm.core import engine_log, replay
from mgpu_llm.core.recording import Recording
from tests.support import recordings

#: A verdict on a stall may come so long after the last progress.
GOAL_S: Final = {"distributed-init": 20.0}
GOAL_ELSEWHERE_S: Final = 60.0
SLOWED: Final = (2, 5)
NEVER: Final = math.inf


@dataclass(frozen=True, kw_only=True)
class Start:
    """One recorded start. `truth` is healthy, stalled or crashed, as people judged it; `last_progress_s` is when a stalled one
    last moved."""

    name: str
    truth: str
    recorded: Recording
    phase: str
    last_progress_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`verdict` gives the second at which the rule ends the start, NEVER if it would not."""

    name: str
    verdict: Callable[[Start], float]


def starts() -> tuple[Start, ...]:
    """The corpus, by name."""
    return tuple(
        Start(
            name=name,
            truth=known.outcome,
            recorded=recordings.load(name),
            phase=known.phase,
            last_progress_s=known.last_progress_s or 0.0,
        )
        for name, known in sorted(recordings.expected().items())
    )


def slowed(start: Start, factor: int) -> Start:
    """The same start on a host that does everything `factor` times more slowly: a synthetic one."""
    return replace(start, name=f"{start.name}, slowed {factor}x", recorded=recordings.slowed(start.recorded, factor))


def ours(start: Start) -> float:
    """The daemon's own judgement, with what it knows on a host that it has never seen."""
    found = replay.judge(start.recorded)
    return found.verdict_at if found.outcome == "stalled" and found.verdict_at is not None else NEVER


def wall_clock(limit_s: float) -> Callable[[Start], float]:
    """Whatever does not serve after `limit_s` is ended."""
    return lambda start: limit_s if start.truth == "stalled" or start.recorded.ended_at > limit_s else NEVER


def silence(limit_s: float, *, repeats_count: bool) -> Callable[[Start], float]:
    """Ended after `limit_s` without output; `repeats_count`: a line that was said before holds it off too."""

    def verdict(start: Start) -> float:
        last = 0.0
        for at in _spoken(start, repeats_count=repeats_count):
            if at - last > limit_s:
                return last + limit_s
            last = at
        if start.truth == "stalled":
            return NEVER if repeats_count and _repeats(start) else last + limit_s
        return last + limit_s if start.recorded.ended_at - last > limit_s else NEVER

    return verdict


def _spoken(start: Start, *, repeats_count: bool) -> Iterator[float]:
    """When the engine said something."""
    said = set[str]()
    for row in start.recorded.rows:
        if row["kind"] == "log":
            line = str(row.get("line", ""))
            if repeats_count or line not in said:
                yield float(row["t"])
            said.add(line)


def _repeats(start: Start) -> bool:
    """Whether a stalled engine goes on talking: it did so after its last progress."""
    return any(
        row["kind"] == "log"
        and float(row["t"]) > start.last_progress_s + 1.0
        and engine_log.is_chatter(str(row["line"]))
        for row in start.recorded.rows
    )


RULES: Final = (
    Rule(name="mgpu-llm", verdict=ours),
    Rule(name="silence 300 s", verdict=silence(300.0, repeats_count=False)),
    Rule(name="any output, 300 s", verdict=silence(300.0, repeats_count=True)),
    Rule(name="silence 30 s", verdict=silence(30.0, repeats_count=False)),
    Rule(name="90 s", verdict=wall_clock(90.0)),
    Rule(name="120 s", verdict=wall_clock(120.0)),
    Rule(name="600 s", verdict=wall_clock(600.0)),
)


def cell(rule: Rule, start: Start) -> str:
    """What the rule makes of the start, in a word: how long after the last progress, or that it was wrong."""
    at = rule.verdict(start)
    if start.truth == "stalled":
        if at < start.last_progress_s:
            return f"**killed at {at:.0f} s**"
        return "never" if at == NEVER else f"{at - start.last_progress_s:.1f} s"
    return "" if at >= start.recorded.ended_at else f"**killed at {at:.0f} s**"


def misses(start: Start) -> str:
    """Why our judgement of the start is not good enough, "" if it is."""
    at = ours(start)
    if start.truth != "stalled":
        return "" if at == NEVER else f"{start.name}: killed at {at:.1f} s though {start.truth}"
    goal_s = GOAL_S.get(start.phase, GOAL_ELSEWHERE_S)
    late_s = at - start.last_progress_s
    return (
        ""
        if 0 <= late_s <= goal_s
        else f"{start.name}: verdict {late_s:.1f} s after the last progress, goal {goal_s:g} s"
    )


def table(corpus: Sequence[Start]) -> list[str]:
    """The whole table as Markdown."""
    healthy = [start for start in corpus if start.truth == "healthy"]
    slow = [slowed(start, factor) for factor in SLOWED for start in healthy]
    stalled = [start for start in corpus if start.truth == "stalled"]
    kills = [sum("killed" in cell(rule, start) for start in [*stalled, *healthy, *slow]) for rule in RULES]
    missed = [sum(cell(rule, start) == "never" for start in stalled) for rule in RULES]
    head = f"All of {len(stalled)} stalled, {len(healthy)} healthy and {len(slow)} slowed starts"
    lines = _rows(
        [head, *(rule.name for rule in RULES)],
        [["false kills", *map(str, kills)], ["never noticed", *map(str, missed)]],
    )
    lines += ["", *_part("Stalled: verdict after the last real progress", stalled)]
    return [*lines, "", *_part("Healthy: empty is right", [*healthy, *slow])]


def _part(title: str, rows: Sequence[Start]) -> list[str]:
    return _rows(
        [title, *(rule.name for rule in RULES)], [[_named(row), *(cell(rule, row) for rule in RULES)] for row in rows]
    )


def _named(start: Start) -> str:
    where = f" ({start.phase})" if start.truth == "stalled" else f" (READY at {start.recorded.ended_at:.0f} s)"
    return start.name + where


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--write", type=Path, help="a Markdown file, whose part from the line <!-- table --> on is replaced"
    )
    given = parser.parse_args()
    corpus = starts()
    lines = table(corpus)
    print("\n".join(lines))
    if given.write is not None:
        text = given.write.read_text(encoding="utf-8")
        given.write.write_text(
            text.partition("<!-- table -->")[0] + "\n".join(["<!-- table -->", *lines]) + "\n", encoding="utf-8"
        )
    slow = [slowed(start, factor) for factor in SLOWED for start in corpus if start.truth == "healthy"]
    wrong = [why for start in [*corpus, *slow] if (why := misses(start))]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
