"""What failed engines said and what was seen of them (tests/data/excerpts), and how each is diagnosed."""

from __future__ import annotations

import gzip
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from mgpu_llm.core import diagnosis, engine_log
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpuSample, Stack
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.stall import Stalled

FOLDER: Final = Path(__file__).parent.parent / "data" / "excerpts"
PHASES: Final = {phase.label: phase for phase in Phase}


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Lines, and what must come of them: `cause` is "" where they name none. `near` are lines that must not match `row`."""

    row: str
    cause: str
    phase: Phase
    origin: str
    lines: tuple[str, ...]
    kernel: bool = False
    near: bool = False
    status: int = 1
    served: bool = False
    wants: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Stall:
    """What was seen of a stall, and what must come of it."""

    row: str
    cause: str
    origin: str
    near: bool
    stalled: Stalled


def quoted() -> tuple[Excerpt, ...]:
    """What others reported, and what the sources say."""
    return tuple(_quoted(row) for row in _read("quoted.toml")["excerpt"])


def recorded() -> dict[str, Excerpt]:
    """The real starts that were broken on purpose, by name."""
    return {name: _recorded(name, row) for name, row in _read("recorded.toml").items()}


def stalls() -> tuple[Stall, ...]:
    """What was seen of engines that stood still."""
    return tuple(_stall(row) for row in _read("stalls.toml")["stall"])


@dataclass(frozen=True, kw_only=True)
class Cures:
    """What truly cures a failure, by its cause, by the row of an excerpt, and by its name. Each entry of a tuple is one of the
    things that it may really be, as the wants of which any cures that."""

    by_cause: Mapping[str, tuple[tuple[Want, ...], ...]]
    by_row: Mapping[str, tuple[tuple[Want, ...], ...]]
    by_name: Mapping[str, tuple[tuple[Want, ...], ...]]

    def of(self, name: str, row: str, cause: str) -> tuple[tuple[Want, ...], ...]:
        """The most particular that is known of it."""
        return self.by_name.get(name) or self.by_row.get(row) or self.by_cause[cause]


@cache
def cures() -> Cures:
    """The whole list."""
    cause, row, name = (
        {key: tuple(tuple(Want(word) for word in way.split(" or ")) for way in ways) for key, ways in table.items()}
        for table in map(_read("cures.toml").__getitem__, ("cause", "row", "failure"))
    )
    return Cures(by_cause=cause, by_row=row, by_name=name)


def clue_of(excerpt: Excerpt) -> Clue:
    """What the daemon knows once it has read the lines."""
    clue = Clue()
    for line in excerpt.lines:
        clue = diagnosis.look_at_kernel(clue, line) if excerpt.kernel else diagnosis.look(clue, engine_log.parse(line))
    return clue


def diagnose(excerpt: Excerpt) -> Diagnosis:
    """What the daemon says of it."""
    clue = clue_of(excerpt)
    if excerpt.served:
        return diagnosis.of_death("the engine ended while serving", clue)
    return diagnosis.of_exit(excerpt.status, excerpt.phase, clue, retries=1)


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


def _quoted(row: dict[str, Any]) -> Excerpt:
    return Excerpt(
        row=row["row"],
        cause=row.get("cause", ""),
        phase=PHASES[row["phase"]],
        origin=row["origin"],
        lines=_lines(row["lines"].splitlines()),
        kernel=row.get("kernel", False),
        near=row.get("near", False),
        status=row.get("status", 1),
    )


def _recorded(name: str, row: dict[str, Any]) -> Excerpt:
    with gzip.open(FOLDER / "recorded" / f"{name}.log.gz", "rt", encoding="utf-8") as lines:
        return Excerpt(
            row="",
            cause=row["cause"],
            phase=PHASES[row["phase"]],
            origin="recorded",
            lines=_lines(lines.read().splitlines()),
            status=row["status"],
            served=row.get("served", False),
            wants=tuple(row["wants"]),
        )


def _stall(row: dict[str, Any]) -> Stall:
    gpus = tuple(
        GpuSample(uuid=f"GPU-{index}", used_bytes=int(gigabytes * 1e9), utilisation_percent=percent)
        for index, (percent, gigabytes) in enumerate(row.get("gpus", []))
    )
    workers = row.get("workers", [[]] if "waits_in" in row else [])
    return Stall(
        row=row["row"],
        cause=row["cause"],
        origin=row["origin"],
        near=row.get("near", False),
        stalled=Stalled(
            phase=PHASES[row["phase"]],
            idle_s=30.0,
            patience_s=25.0,
            spinning=any(gpu.utilisation_percent == 100 for gpu in gpus),
            evidence=("seen",),
            stopped=tuple(row.get("stopped", ())),
            lock_waits=tuple(row.get("lock_waits", ())),
            storage_waits=tuple(row.get("storage_waits", ())),
            thrashing=row.get("thrashing", ""),
            gpus=gpus,
            stacks=tuple(_stack(pid, frames, row) for pid, frames in enumerate(workers, start=71)),
            last_line=row.get("last_line", ""),
        ),
    )


def _stack(pid: int, frames: Iterable[str], row: dict[str, Any]) -> Stack:
    process, waits_in = "VLLM::Worker_TP", row.get("waits_in", "")
    return Stack(pid=pid, thread=pid, process=process, frames=tuple(frames), waits_in=waits_in)


def _lines(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(line for line in lines if line.strip())
