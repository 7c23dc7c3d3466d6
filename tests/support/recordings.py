"""Recorded starts of the real vLLM, read as the events that the adapters would have made of them.

The recordings lie in tests/data/recordings; the README there has their format. A reading is tolerant: rows of an unknown
kind, fields that are missing and lists that are empty are taken as "nothing was seen here".
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mgpu_llm.core.events import (
    EngineExited,
    EngineSpawned,
    Event,
    GpuSample,
    GpusSampled,
    LineRead,
    ProcessesSampled,
    ProcessSample,
    Ticked,
)

FOLDER: Final = Path(__file__).parent.parent / "data" / "recordings"
#: What comes after one of these notes is the recorder's own clean-up.
END_NOTES: Final = frozenset({"healthy", "exit", "limit", "stopping"})
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded start. `rows` are those up to its end, `ended_by` names the note that ended it ("" when none did),
    `ended_at` is in seconds since the spawn, and `exit_status` is set where the engine ended by itself."""

    name: str
    rows: tuple[Row, ...]
    ended_by: str
    ended_at: float
    exit_status: int | None

    @property
    def has_gpus(self) -> bool:
        return any(row.get("gpus") for row in self.rows)

    @property
    def lines(self) -> tuple[str, ...]:
        """Every printed line, without colours."""
        return tuple(_text(row) for row in self.rows if row.get("kind") == "log")


def names() -> tuple[str, ...]:
    """The recordings there are."""
    return tuple(sorted(path.name.removesuffix(".jsonl.gz") for path in FOLDER.glob("*.jsonl.gz")))


def load(name: str) -> Recording:
    """Read one recording up to the point from which the recorder cleans up."""
    with gzip.open(FOLDER / f"{name}.jsonl.gz", mode="rt", encoding="utf-8") as lines:
        return cut(name, (json.loads(line) for line in lines if line.strip()))


def cut(name: str, rows: Iterable[Row]) -> Recording:
    """The recording in `rows`, without what follows its end."""
    kept = list[Row]()
    for row in rows:
        if row.get("kind") == "note" and row.get("what") in END_NOTES:
            status = row.get("rc") if row["what"] == "exit" else None
            return Recording(
                name=name, rows=tuple(kept), ended_by=row["what"], ended_at=float(row["t"]), exit_status=status
            )
        kept.append(row)
    last = float(kept[-1]["t"]) if kept else 0.0
    return Recording(name=name, rows=tuple(kept), ended_by="", ended_at=last, exit_status=None)


def events(recording: Recording, *, attempt: int = 1, spawned_at: float = 0.0, tick_s: float = 0.5) -> Iterator[Event]:
    """The start as events: the spawn, every line and sample at its time, a tick each `tick_s`, and the exit if there
    was one. Times are `spawned_at` plus the recorded ones."""
    yield EngineSpawned(at=spawned_at, attempt=attempt, pid=_top_pid(recording))
    ticked = 0
    for row in recording.rows:
        while (ticked + 1) * tick_s <= row["t"]:
            ticked += 1
            yield Ticked(at=spawned_at + ticked * tick_s)
        yield from of_row(row, attempt=attempt, spawned_at=spawned_at)
    while (ticked + 1) * tick_s <= recording.ended_at:
        ticked += 1
        yield Ticked(at=spawned_at + ticked * tick_s)
    if recording.exit_status is not None:
        yield EngineExited(at=spawned_at + recording.ended_at, attempt=attempt, status=recording.exit_status)


def of_row(row: Row, *, attempt: int, spawned_at: float) -> Iterator[Event]:
    """What one row says: a line, a sample of processes, a sample of GPUs, or nothing."""
    at = spawned_at + float(row["t"])
    if row.get("kind") == "log":
        yield LineRead(at=at, attempt=attempt, text=_text(row))
    if row.get("kind") != "sample":
        return
    if processes := row.get("procs"):
        yield ProcessesSampled(at=at, attempt=attempt, processes=tuple(_process(process) for process in processes))
    if gpus := [gpu for gpu in row.get("gpus") or () if "mem" in gpu]:
        samples = tuple(_gpu(index, gpu) for index, gpu in enumerate(gpus))
        yield GpusSampled(at=at, attempt=attempt, gpus=samples)


def _text(row: Row) -> str:
    return _COLOURS.sub("", str(row.get("line", "")))


def _process(row: Row) -> ProcessSample:
    return ProcessSample(
        pid=row["pid"],
        started=0,
        name=row.get("name", ""),
        state=row.get("st", ""),
        cpu_s=row.get("cpu", 0.0),
        major_faults=row.get("majflt", 0),
        rss_bytes=row.get("rss", 0),
        read_chars=row.get("rchar"),
        read_bytes=row.get("rbytes"),
        written_bytes=row.get("wbytes"),
    )


def _gpu(index: int, row: Row) -> GpuSample:
    return GpuSample(
        uuid=f"GPU-{index}", used_bytes=row["mem"], utilisation_percent=row.get("util"), power_mw=row.get("mw")
    )


def _top_pid(recording: Recording) -> int:
    """The engine's first process: the recorder samples it first. 1 where no process was ever seen."""
    trees = (row["procs"] for row in recording.rows if row.get("procs"))
    return int(next(trees, [{"pid": 1}])[0]["pid"])
