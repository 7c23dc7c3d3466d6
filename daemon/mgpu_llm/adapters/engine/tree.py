"""Which processes are the engine's, read from /proc, and how to end all of them.

Reads only /proc/PID/stat: cmdline, environ and maps wait for the process's memory lock, and a process that is stuck in
the driver may hold it for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Stat:
    """/proc/PID/stat, as far as it is of use (man 5 proc). `started` and `cpu` are clock ticks, `rss` is pages."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    cpu: int
    major_faults: int
    threads: int
    started: int
    rss: int

    @property
    def alive(self) -> bool:
        """A zombie has let go of everything, unless it is only the first thread and others still run."""
        return self.state not in "ZX" or self.threads > 1

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name}, state {self.state})"


def read_stat(pid: int) -> Stat | None:
    """None when the process is gone. The name may hold spaces and brackets, so the last ")" ends it."""
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    before, _, after = text.rpartition(b")")
    fields = after.split()
    return Stat(
        pid=pid,
        name=before.partition(b"(")[2].decode("utf-8", "replace"),
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        major_faults=int(fields[9]),
        cpu=int(fields[11]) + int(fields[12]),
        threads=int(fields[17]),
        started=int(fields[19]),
        rss=int(fields[21]),
    )


def all_pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]


def all_stats() -> dict[int, Stat]:
    """Every process that can be seen, by pid."""
    stats = (read_stat(pid) for pid in all_pids())
    return {stat.pid: stat for stat in stats if stat is not None}


def with_descendants(roots: Iterable[Stat], stats: dict[int, Stat]) -> dict[int, Stat]:
    children: dict[int, list[Stat]] = {}
    for stat in stats.values():
        children.setdefault(stat.parent, []).append(stat)
    found: dict[int, Stat] = {}
    todo = list(roots)
    while todo:
        stat = todo.pop()
        if stat.pid not in found:
            found[stat.pid] = stat
            todo += children.get(stat.pid, ())
    return found


def send_kill(stat: Stat) -> None:
    """SIGKILL to exactly this process, never to a later one that was given its pid."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(stat.pid)
        try:
            now = read_stat(stat.pid)
            if now is not None and now.started == stat.started:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


class Tree(Protocol):
    """The processes of one attempt."""

    def members(self) -> tuple[Stat, ...]:
        """Those that are alive. Never waits on a stuck process."""

    def kill(self) -> tuple[Stat, ...]:
        """SIGKILL to every one; returns those that were still alive. To be called again until there are none."""

    def remove(self) -> str:
        """Let go of what the tree needed in the system, when no process is left. Returns what went wrong, or ""."""


class WalkedTree:
    """The processes of one attempt, found by descent. Needs `adopt_orphans` and that `top` leads a session of its own
    and, once ended, is not reaped while this is used: then its pid, which names the session, cannot be given away.

    A process cannot leave its descent from us: when its parent ends it becomes our child. So the engine's are the
    session of `top`, whatever was once seen to descend from it, and those of our own children that lead or follow
    another session than ours and for which `is_ours(pid)` holds.

    The group of `top` is killed in one stroke, which no fork outruns. A process that left it and then forks and ends
    within a few milliseconds, again and again, can outrun the passes: only a cgroup ends that for certain.
    """

    def __init__(self, top: Stat, is_ours: Callable[[int], bool]) -> None:
        self._top = top
        self._is_ours = is_ours
        self._known = frozenset({(top.pid, top.started)})

    def members(self) -> tuple[Stat, ...]:
        found = self._find(all_stats(), ())
        for stat in found:
            # An engine may serve for months, and what it orphans would fill the process table with zombies.
            if not stat.alive:
                self._reap(stat)
        return tuple(stat for stat in found if stat.alive)

    def kill(self) -> tuple[Stat, ...]:
        stats = all_stats()
        found = self._find(stats, self._orphans(stats))
        alive = tuple(stat for stat in found if stat.alive)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._top.pid, signal.SIGKILL)
        for stat in alive:
            send_kill(stat)
        for stat in found:
            self._reap(stat)
        return alive

    def remove(self) -> str:
        return ""

    def _find(self, stats: dict[int, Stat], orphans: Iterable[Stat]) -> tuple[Stat, ...]:
        known = self._known
        roots = [s for s in stats.values() if s.session == self._top.pid or (s.pid, s.started) in known]
        found = with_descendants([*roots, *orphans], stats)
        self._known = frozenset((stat.pid, stat.started) for stat in found.values()) | {
            (self._top.pid, self._top.started)
        }
        return tuple(found.values())

    def _orphans(self, stats: dict[int, Stat]) -> list[Stat]:
        """Children of ours that made a session of their own and lost their parent before anybody saw them."""
        us = os.getpid()
        ours = os.getsid(0)
        return [
            s
            for s in stats.values()
            if s.parent == us and s.session != ours and s.started >= self._top.started and s.state not in "DZX"
            if (s.pid, s.started) not in self._known and self._is_ours(s.pid)
        ]

    def _reap(self, stat: Stat) -> None:
        """Orphans of the engine are our children and stay zombies until we ask for them, each by its pid."""
        if stat.parent == os.getpid() and stat.pid != self._top.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, stat.pid, os.WEXITED | os.WNOHANG)
