"""The recorded starts of the real vLLM in tests/data/recordings, and how each must be judged (expected.json beside them)."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from mgpu_llm.core import engine_log, recording, replay
from mgpu_llm.core.recording import Recording
from mgpu_llm.core.replay import Report

FOLDER: Final = Path(__file__).parent.parent / "data" / "recordings"
_SUFFIX: Final = ".jsonl.gz"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """As people judged it: `cause` is None for a healthy start, `last_progress_s` is when a stalled one last moved, in
    seconds since the spawn, as it was measured beside the daemon."""

    outcome: str
    cause: str | None
    phase: str
    last_progress_s: float | None


def names() -> tuple[str, ...]:
    """The recordings there are."""
    return tuple(sorted(path.name.removesuffix(_SUFFIX) for path in FOLDER.glob(f"*{_SUFFIX}")))


def expected() -> dict[str, Expected]:
    """What is expected, by name."""
    rows: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
    return {name: Expected(**row) for name, row in rows.items()}


@cache
def load(name: str) -> Recording:
    """Read one recording up to the point from which its recorder cleans up. The same one each time: not to be changed."""
    with gzip.open(FOLDER / f"{name}{_SUFFIX}") as lines:
        return recording.read(lines)


@cache
def judged(name: str) -> Report:
    """The recording as the daemon would have judged it."""
    return replay.judge(load(name))


def speaks(recorded: Recording) -> bool:
    """Whether the engine said anything that tells where it is: one whose log level is ERROR does not."""
    return any(engine_log.facts(engine_log.parse(line).message).phase is not None for line in recorded.lines)


def slowed(recorded: Recording, factor: float) -> Recording:
    """The same start on a host that needs so many times as long for everything that it does itself. How long somebody else
    stopped a process (SIGSTOP to SIGCONT, noted as a fault) is not its doing."""
    pauses = _pauses(recorded)

    def later(t: float) -> float:
        paused = sum(min(max(t - begun, 0.0), ended - begun) for begun, ended in pauses)
        return (t - paused) * factor + paused

    rows = tuple({**row, "t": later(row["t"])} for row in recorded.rows)
    return replace(recorded, rows=rows, ended_at=later(recorded.ended_at))


def _pauses(recorded: Recording) -> list[tuple[float, float]]:
    """From when to when a process was stopped that went on later."""
    faults = [(str(row.get("fault")), float(row["t"])) for row in recorded.rows if row.get("what") == "fault"]
    begun = [t for fault, t in faults if fault.startswith("sigstop-for")]
    return list(zip(begun, [t for fault, t in faults if fault == "sigcont"], strict=False))
