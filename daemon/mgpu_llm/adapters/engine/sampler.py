"""What the engine's processes have done so far, from /proc/PID/stat and /proc/PID/io."""

from __future__ import annotations

import os

from mgpu_llm.adapters.engine.tree import Stat, Tree, read_proc
from mgpu_llm.core.events import ProcessSample

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def sample(tree: Tree) -> tuple[ProcessSample, ...]:
    """One sample of every living process of the tree, by pid. Plain and synchronous: run it in a worker thread."""
    return tuple(_sample(stat) for stat in sorted(tree.members(), key=lambda stat: stat.pid))


def _sample(stat: Stat) -> ProcessSample:
    io = _read_io(stat.pid)
    return ProcessSample(
        pid=stat.pid,
        started=stat.started,
        name=stat.name,
        state=stat.state,
        cpu_s=stat.cpu / TICKS_PER_S,
        major_faults=stat.major_faults,
        rss_bytes=stat.rss * PAGE_BYTES,
        read_chars=_count(io, b"rchar:"),
        read_bytes=_count(io, b"read_bytes:"),
        written_bytes=_count(io, b"write_bytes:"),
    )


def _read_io(pid: int) -> dict[bytes, bytes]:
    """Empty where it may not be read (another user's process, or one that has just ended)."""
    words = read_proc(f"{pid}/io").split()
    return dict(zip(words[::2], words[1::2], strict=True))


def _count(io: dict[bytes, bytes], name: bytes) -> int | None:
    return int(io[name]) if name in io else None
