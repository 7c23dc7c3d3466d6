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
#: How many looks come to one that also sees new processes, and to one that reads every process of the host. While loading
#: that is each 1.5 and each 15 s or so.
LIST_EVERY = 3
WHOLE_EVERY = 30


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
    text = read_proc(f"{pid}/stat")
    if not text:
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


def read_proc(name: str) -> bytes:
    """A file below /proc of less than a page, b"" where it is gone or not to be read. As short as it can be: a loading
    engine is read so a hundred times a second."""
    try:
        descriptor = os.open(f"/proc/{name}", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def all_pids() -> list[int]:
    return [int(name) for name in _listed() if name.isdecimal()]


def _listed() -> frozenset[str]:
    return frozenset(os.listdir(PROC))  # noqa: PTH208 - iterdir takes ten times as long


def all_stats() -> dict[int, Stat]:
    """Every process that can be seen, by pid."""
    return _stats(all_pids())


def _stats(pids: Iterable[int]) -> dict[int, Stat]:
    stats = (read_stat(pid) for pid in pids)
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


def send(stat: Stat, number: signal.Signals) -> None:
    """A signal to exactly this process, never to a later one that was given its pid; nothing where we may not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        pidfd = os.pidfd_open(stat.pid)
        try:
            now = read_stat(stat.pid)
            if now is not None and now.started == stat.started:
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def send_kill(stat: Stat) -> None:
    send(stat, signal.SIGKILL)


class Tree(Protocol):
    """The processes of one attempt."""

    def members(self, *, whole: bool = False) -> tuple[Stat, ...]:
        """Those that are alive. Never waits on a stuck process. Some may be missed for a few seconds unless `whole`."""

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

    Reading every process of a host is dear, so a look reads those that are known, each LIST_EVERY looks also those that
    are new, and each WHOLE_EVERY looks all: who is none of the engine's never becomes one, but a pid may be given away.
    `kill` always reads all.

    The group of `top` is killed in one stroke, which no fork outruns. A process that left it and then forks and ends
    within a few milliseconds, again and again, can outrun the passes: only a cgroup ends that for certain.
    """

    def __init__(self, top: Stat, is_ours: Callable[[int], bool]) -> None:
        self._top = top
        self._is_ours = is_ours
        self._known = frozenset({(top.pid, top.started)})
        self._strangers = frozenset[str]()
        self._looks = 0

    def members(self, *, whole: bool = False) -> tuple[Stat, ...]:
        look, self._looks = self._looks, self._looks + 1
        if whole or look % WHOLE_EVERY == 0:
            self._strangers = frozenset()
            stats = self._unless_strangers()
        elif look % LIST_EVERY == 0:
            stats = self._unless_strangers()
        else:
            stats = _stats(pid for pid, _ in self._known)
        found = self._find(stats, ())
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

    def _unless_strangers(self) -> dict[int, Stat]:
        """Every process that is not known to be a stranger.

        Who is none of ours is a stranger from then on, but only once its parent was listed too: a child that is forked
        during the listing can be in it without its parent, which may be ours.
        """
        names = _listed()
        stats = _stats(int(name) for name in names - self._strangers if name.isdecimal())
        ours = with_descendants(self._roots(stats), stats)
        others = (stat for stat in stats.values() if stat.pid not in ours)
        strangers = {str(stat.pid) for stat in others if stat.parent == 0 or str(stat.parent) in names}
        self._strangers = (self._strangers & names) | strangers
        return stats

    def _roots(self, stats: dict[int, Stat]) -> list[Stat]:
        return [s for s in stats.values() if s.session == self._top.pid or (s.pid, s.started) in self._known]

    def _find(self, stats: dict[int, Stat], orphans: Iterable[Stat]) -> tuple[Stat, ...]:
        found = with_descendants([*self._roots(stats), *orphans], stats)
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
