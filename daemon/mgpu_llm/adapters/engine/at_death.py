"""Where the Python threads of processes stood that may not be looked into: each prints it as it dies of SIGABRT.

PYTHONFAULTHANDLER=1 lets a Python (3.3 and later) write the stacks of its threads to stderr on SIGABRT, without its GIL, and die
of the signal then (docs.python.org/3/library/faulthandler). vLLM does not turn that on by itself (0.32.0).
"""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mgpu_llm.adapters.engine.tree import PROC, Stat, read_stat, send

VARIABLE: Final = "PYTHONFAULTHANDLER"
PASS_S: Final = 0.01
#: One byte: enough for no dump into a file, and the kernel gives none to a program either (fs/coredump.c; at 0 it would).
NO_CORE: Final = 1


def asked_for(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine that prints its stacks when it dies, unless the admin has set the variable himself."""
    return {VARIABLE: "1", **environment}


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """An empty value is Python's way to leave it off."""
    return bool(environment.get(VARIABLE))


async def abort(members: Sequence[Stat], limit_s: float, say: Callable[[str], None]) -> None:
    """SIGABRT to each Python among them, one after the other, those without children first; `say` takes a line before each.

    All are stopped before: one that runs would end the others, or itself, when it notices that a child has died. And of one whose
    main thread is stuck in the kernel another thread then takes the signal (Linux 6.18), and prints for all. Takes at most
    `limit_s`. One that does not end costs its share of that, and is left as it is.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + limit_s
    for stat in members:
        send(stat, signal.SIGSTOP)
    pythons = [stat for stat in deepest_first(members) if _may_be_python(stat.pid)]
    for number, stat in enumerate(pythons):
        share_s = (deadline - clock()) / (len(pythons) - number)
        if why := _without_core(stat.pid):
            say(f"# {stat}: {why}")
            continue
        say(f"# {stat}")
        send(stat, signal.SIGABRT)
        send(stat, signal.SIGCONT)
        if not await _ends(stat, clock() + share_s):
            send(stat, signal.SIGSTOP)
            say("# it has not ended")


def deepest_first(members: Sequence[Stat]) -> list[Stat]:
    """Children before their parents, otherwise in the order of their pids."""
    parents = {stat.pid: stat.parent for stat in members}

    def depth(pid: int) -> int:
        above = 0
        while (pid := parents.get(pid, 0)) in parents and above < len(parents):
            above += 1
        return above

    return sorted(members, key=lambda stat: (-depth(stat.pid), stat.pid))


def _may_be_python(pid: int) -> bool:
    """Also where its program may not be seen. (The link waits for no lock of the process.)"""
    try:
        return (PROC / str(pid) / "exe").readlink().name.startswith(("python", "pypy"))
    except FileNotFoundError:  # it has ended
        return False
    except OSError:
        return True


def _without_core(pid: int) -> str:
    """Let it leave no core dump, which of one worker may fill the disk. Why that cannot be, and "" if it can."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_CORE)
        most = NO_CORE if hard == resource.RLIM_INFINITY else min(NO_CORE, hard)
        resource.prlimit(pid, resource.RLIMIT_CORE, (most, hard))
    except ProcessLookupError:
        return "it has ended"
    except OSError as error:
        return f"not asked, because it could leave a core dump: {(error.strerror or str(error)).lower()}"
    return ""


async def _ends(stat: Stat, deadline: float) -> bool:
    """Whether it has let go of its memory by then: it prints nothing any more. To leave the GPU takes longer."""
    clock = asyncio.get_running_loop().time
    while (now := read_stat(stat.pid)) is not None and now.started == stat.started and now.alive and now.rss > 0:
        if clock() >= deadline:
            return False
        await asyncio.sleep(PASS_S)
    return True
