"""The measured signals of the heartbeat: what each is summed from, and by how much it must change to count as movement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mgpu_llm.core.events import GpuSample, ProcessSample

MIB: Final = 1 << 20

#: What each signal must change by, within WINDOW_S, to count as movement. A hung vLLM, idle interpreters included, moves
#: every one of them by exactly nothing (docs/design.md has the measurement): the floors are there for other hosts. Those for
#: bytes read lie below what one read of a disk brings (a page fault reads around 64 KiB), so that a disk counts however slow.
NOISE_FLOOR: Final[Mapping[str, float]] = {
    "gpu_memory": 1 * MIB,
    "rss": 1 * MIB,
    "rss_high": 1 * MIB,
    "read_chars": 64 << 10,
    "read_bytes": 16 << 10,
    "written_bytes": 64 << 10,
    "major_faults": 8,
    "compilers": 0.5,
}
WINDOW_S: Final = 5.0
#: Compilers, by what the kernel calls them, in at most 15 letters: "nvcc", "gcc-real", "g++-12", "x86_64-linux-gn", "ld.lld".
_COMPILER: Final = re.compile(
    r"(?:[\w.]+-)*(?:nvcc|cicc|ptxas|nvlink|fatbinary|cudafe\+\+|tileiras|ninja|cc1plus|cc1|lto1|collect2|[gc]\+\+|gcc|clang|clang\+\+"
    r"|ld|ld\.\w+|mold|as|rustc)(?:-real|-blackwell|-[\d.]+)?|x86_64-linux-gn|aarch64-linux-g"
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A signal's value when it last moved, or when its window began anew."""

    at: float
    value: float


def is_compiler(name: str) -> bool:
    """Whether a process is a compiler: those wait for no peer, so their processor time is work."""
    return _COMPILER.fullmatch(name.lower()) is not None


def measured(marks: Mapping[str, Mark], values: Mapping[str, float], at: float) -> tuple[set[str], Mapping[str, Mark]]:
    """Compare each value with its mark. What changed by its floor within the window has moved and gets a new mark;
    a window that passed without gets one too, so that a slow drip below the floor never adds up to movement."""
    moved, fresh = set[str](), dict(marks)
    for signal, value in values.items():
        mark = marks.get(signal)
        if mark is None:
            fresh[signal] = Mark(at=at, value=value)
        elif abs(value - mark.value) >= NOISE_FLOOR[signal.split(" ", 1)[0]]:
            moved.add(signal)
            fresh[signal] = Mark(at=at, value=value)
        elif at - mark.at > WINDOW_S:
            fresh[signal] = Mark(at=at, value=value)
    return moved, fresh


def process_totals(
    totals: Mapping[str, float], pairs: Iterable[tuple[ProcessSample, ProcessSample]]
) -> dict[str, float]:
    """The totals so far, with what each process has added from one sample to the next: so a process that ends takes
    nothing away."""
    total = {signal: totals.get(signal, 0.0) for signal in NOISE_FLOOR if signal != "gpu_memory"}
    for before, now in pairs:
        # Only growth: the kernel takes pages from a hung process too when others need memory. What comes and goes with a
        # process is not its work.
        total["rss"] += max(now.rss_bytes - before.rss_bytes, 0)
        total["read_chars"] += _grown(before.read_chars, now.read_chars)
        total["read_bytes"] += _grown(before.read_bytes, now.read_bytes)
        total["written_bytes"] += _grown(before.written_bytes, now.written_bytes)
        total["major_faults"] += max(now.major_faults - before.major_faults, 0)
        if now.cpu_s > before.cpu_s and is_compiler(now.name):
            total["compilers"] += now.cpu_s - before.cpu_s
    return total


def gpu_memory(gpus: Sequence[GpuSample], pids: frozenset[int]) -> dict[str, float]:
    """Bytes by GPU, as signals. Where the driver names processes of ours on any GPU, only what they hold counts on all of them:
    another tenant's allocations are not our engine's progress. Where it names none of ours (they have none yet, or it counts
    pids otherwise, as in a container), the whole card does."""
    ours = {gpu.uuid: [held for pid, held in gpu.processes or () if pid in pids and held is not None] for gpu in gpus}
    known = any(ours.values())
    return {
        f"gpu_memory {gpu.uuid} {'ours' if known else 'card'}": float(sum(ours[gpu.uuid]) if known else gpu.used_bytes)
        for gpu in gpus
    }


def _grown(before: int | None, now: int | None) -> int:
    return now - before if before is not None and now is not None and now > before else 0
