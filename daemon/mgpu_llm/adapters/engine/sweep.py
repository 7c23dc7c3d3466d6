"""Engines of an earlier life of the daemon, which died without ending them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mgpu_llm.adapters.engine import leftovers, tags
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.cgroup import left_behind, remove_empty
from mgpu_llm.adapters.engine.ledger import Ledger
from mgpu_llm.adapters.engine.tree import Stat, all_stats, send_kill, with_descendants

LOOK_S = 5.0
PASS_S = 0.05


async def sweep_orphans(
    runtime_dir: Path,
    *,
    clock: Callable[[], float],
    deadline_s: float,
    cgroup: Path | None = None,
    ledger: Ledger | None = None,
) -> list[str]:
    """SIGKILL to every process of an engine that this daemon (told by `runtime_dir`, and by its delegated `cgroup`) once
    spawned, and away with what they held in /dev/shm, now or by the `ledger`, and their sockets. To be called before the first
    spawn. Returns a sentence for each process, such as "killed pid 71 (VLLM::EngineCor, state S) of an earlier run", for each
    file that nobody held any more, and for what could not be done."""
    deadline = clock() + deadline_s
    files: set[leftovers.File] = set()
    seen: dict[int, Stat] = {}
    left: tuple[str, ...] | None = ()
    while True:
        found = await aside(lambda: _engines(tags.prefix(runtime_dir), cgroup), LOOK_S)
        if found is None:
            return ["cannot look for engines of an earlier run: a process that is stuck cannot be looked at"]
        new = {stat.pid: stat for stat in found if stat.pid not in seen}
        files |= await aside(partial(_memory_of, tuple(new)), LOOK_S) or frozenset()
        seen |= new
        for stat in found:
            send_kill(stat)
        if not found or clock() >= deadline:
            break
        await asyncio.sleep(PASS_S)
    if not found:
        await aside(lambda: leftovers.remove_unheld(frozenset(files)), LOOK_S)
        leftovers.remove_socket_folders(runtime_dir)
        left = await aside(ledger.remove_left, LOOK_S) if ledger is not None else ()
    if cgroup is not None:
        remove_empty(cgroup)
    stuck = {stat.pid for stat in found}
    told = [f"killed {stat} of an earlier run" for stat in seen.values() if stat.pid not in stuck]
    told += [f"cannot end {stat} of an earlier run: it outlives SIGKILL" for stat in found]
    return [*told, *(left or ())]


def _memory_of(pids: tuple[int, ...]) -> frozenset[leftovers.File]:
    return leftovers.held(leftovers.likely(leftovers.shared_files()), pids)


def _engines(beginning: str, cgroup: Path | None) -> tuple[Stat, ...]:
    """Marked processes, and those in their sessions (an engine's sessions are its own) and below them; and whatever is in the
    engines' cgroups.

    The mark alone is not enough: a process that names itself may overwrite its environment. It is too much where we
    were begun from a copy of an engine's environment: we and those above us are no engine.
    """
    marked = tags.find(beginning)
    stats = all_stats()
    sessions = {stats[pid].session for pid in marked if pid in stats} - {os.getsid(0)}
    above = _lineage(stats)
    roots = [s for s in stats.values() if (s.session in sessions or s.pid in marked) and s.pid not in above]
    inside = left_behind(cgroup, above) if cgroup is not None else ()
    found = {**with_descendants(roots, stats), **{stat.pid: stat for stat in inside}}.values()
    return tuple(stat for stat in found if stat.alive and stat.pid not in above)


def _lineage(stats: dict[int, Stat]) -> frozenset[int]:
    """Our own pid, our parent's, and so on up."""
    pids, pid = set[int](), os.getpid()
    while pid in stats and pid not in pids:
        pids.add(pid)
        pid = stats[pid].parent
    return frozenset(pids)
