"""What recordings say about the heartbeat: `python -m tests.bench.quiet FILE.jsonl.gz...`, one line each."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mgpu_llm.core import progress as heart
from mgpu_llm.core import recording
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import Event, GpusSampled, LineRead, ProcessesSampled
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.recording import Recording


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """The longest time in which no signal moved, when it was over, and the phase it was in. `last_moved_at` and `last_moved`:
    when anything moved last, and what. All times in seconds since the spawn."""

    longest_s: float
    until: float
    phase: Phase
    last_moved_at: float
    last_moved: tuple[str, ...]


def load(path: Path) -> Recording:
    """Raises RecordingError."""
    with gzip.open(path) as lines:
        return recording.read(lines)


def quiet(happened: Iterable[Event]) -> Quiet:
    """Fold the heartbeat over a start."""
    progress = heart.begin(0.0)
    longest, until, phase = 0.0, 0.0, Phase.BOOT
    for event in happened:
        progress = _after(progress, event)
        if progress.quiet_s > longest:
            longest, until, phase = progress.quiet_s, event.at, progress.phase
    last = progress.last_moved_at
    moved = tuple(sorted(name for name, at in progress.moved.items() if at == last))
    return Quiet(longest_s=longest, until=until, phase=phase, last_moved_at=last, last_moved=moved)


def _after(progress: Progress, event: Event) -> Progress:
    match event:
        case LineRead():
            return heart.after_line(progress, event)
        case ProcessesSampled():
            return heart.after_processes(progress, event)
        case GpusSampled():
            return heart.after_gpus(progress, event)
        case _:
            return progress


def main() -> int:
    print(
        "| recording | KB | ended | last moved | by | longest quiet | until | in phase |\n|---|---|---|---|---|---|---|---|"
    )
    for path in map(Path, sys.argv[1:]):
        taken = load(path)
        found = quiet(recording.events(taken))
        ended = f"{taken.ended_by or 'broken off'} at {taken.ended_at:.1f}"
        print(
            f"| {path.name.removesuffix('.jsonl.gz')} | {path.stat().st_size / 1000:.0f} | {ended} "
            f"| {found.last_moved_at:.1f} | {', '.join(found.last_moved)} "
            f"| {found.longest_s:.1f} | {found.until:.1f} | {found.phase.label} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
