"""Where every thread of the engine's processes stands, taken from outside, without stopping any of them.

Python frames come from py-spy, one short-lived process for each of the engine's; what the kernel says from
/proc/PID/task/TID/stat and wchan. These, and the link exe, wait for no lock of the process. py-spy reads maps and memory and
may wait for one that a process stuck in the driver holds: then it is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgpu_llm.adapters.engine import py_spy
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.tree import PROC, Stat, read_stat
from mgpu_llm.core.events import Stack

#: So many processes are looked into at once; one that is slow gives its place away, since it only waits.
AT_ONCE = 2
SLOW_S = 1.0
#: A running process may be caught in the middle of a step, or before its interpreter is up.
TRIES = 10
RETRY_S = 0.01
#: How long the end of a killed py-spy is waited for. Longer takes only one that waits for a lock of a stuck process.
END_S = 1.0
#: So many processes are named in a reason.
NAMED = 3
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
PTRACE_FIX = "give the daemon CAP_SYS_PTRACE (AmbientCapabilities= of its unit, --cap-add of a container)"


@dataclass(frozen=True, kw_only=True)
class _Process:
    """`python` is None where the program may not be seen."""

    stat: Stat
    python: bool | None


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was seen of one process. `trouble` says why its Python frames could not be had, if it may have some."""

    stacks: tuple[Stack, ...] = ()
    who: str = ""
    trouble: str = ""


async def take(
    pids: Sequence[int], deadline_s: float = 10.0, find: Callable[[], Path | None] = py_spy.find
) -> tuple[tuple[Stack, ...], str]:
    """The threads of these processes, process after process, each one's main thread first, and why the Python frames of
    some Python processes could not be had, in one line ("" when all were). `find` says where py-spy is.

    A process that runs no Python, or that may not be looked into, gives its main thread as the kernel sees it. Those that
    have ended are left out. A stack of a thread that runs may be torn: frames of two moments, or none.

    Takes at most `deadline_s` and a second, with 5 processes of a vLLM 0.1 s. Raises nothing. No py-spy is left afterwards,
    unless it waits in the kernel for a lock that a stuck process holds: it has been sent SIGKILL.
    """
    end = time.monotonic() + deadline_s
    spies = py_spy.Spies(await aside(find, deadline_s))
    slots = asyncio.Semaphore(AT_ONCE)
    try:
        looks = await asyncio.gather(*(_look_in_turn(pid, spies, slots, end) for pid in pids))
    finally:
        spies.kill()
        await aside(spies.wait, END_S)
    return tuple(stack for look in looks for stack in look.stacks), _reason(looks)


def text(seen: Sequence[Stack], unobserved: str) -> str:
    """One look for people to read."""
    lines = [f"not observed: {unobserved}"] if unobserved else []
    before = 0
    for stack in seen:
        if stack.pid != before:
            lines.append(f"\npid {stack.pid} ({stack.process})")
        before = stack.pid
        waits = f", waits in {stack.waits_in}" if stack.waits_in else ""
        lines.append(f"  thread {stack.thread} {stack.name}".rstrip() + f": state {stack.state or '?'}{waits}")
        lines += [f"    {frame}" for frame in stack.frames]
    return "\n".join(lines) + "\n"


async def _look_in_turn(pid: int, spies: py_spy.Spies, slots: asyncio.Semaphore, end: float) -> _Look:
    async with slots:
        process = await aside(lambda: _process(pid), max(SLOW_S, end - time.monotonic()))
        if process is None:
            return _Look(who=f"pid {pid}", trouble=py_spy.NO_ANSWER)
        if isinstance(process, _Look):
            return process
        left_s = end - time.monotonic()
        if left_s <= 0:
            return _without_python(process, "no time was left for it")
        # A little longer than the work itself waits, so that its own word comes first.
        look = asyncio.create_task(aside(lambda: _look(process, spies, end), left_s + 0.1))
        await asyncio.wait({look}, timeout=SLOW_S)
    return await look or _without_python(process, py_spy.NO_ANSWER)


def _process(pid: int) -> _Process | _Look:
    """An empty look for one that has ended."""
    stat = read_stat(pid)
    if stat is None or not stat.alive:
        return _Look()
    try:
        program = (PROC / str(pid) / "exe").readlink()
    except FileNotFoundError:  # it has let go of its memory already, and ends
        return _Process(stat=stat, python=False)
    except OSError:
        return _Process(stat=stat, python=None)
    return _Process(stat=stat, python=program.name.startswith(("python", "pypy")))


def _look(process: _Process, spies: py_spy.Spies, end: float) -> _Look:
    answer = _ask(process, spies, end)
    now = _now(process)
    if now is None:
        return _Look()
    pid, threads = now.stat.pid, answer.threads
    if not threads:
        return _without_python(now, _why_denied(pid) if answer.denied else answer.trouble)
    if pid not in {thread.number for thread in threads}:
        threads = (py_spy.Thread(pid), *threads)
    ordered = sorted(threads, key=lambda thread: (thread.number != pid, thread.number))
    return _Look(stacks=tuple(_stack(now.stat, thread) for thread in ordered))


def _ask(process: _Process, spies: py_spy.Spies, end: float) -> py_spy.Answer:
    best = answer = py_spy.Answer()
    for turn in range(TRIES):
        answer = spies.ask(process.stat.pid, max(0.0, end - time.monotonic()))
        best = answer if answer.threads else best
        # A program that is not Python's may have it inside; but one refusal is enough then.
        if not answer.again or process.python is False or _now(process) is None:
            break
        time.sleep(RETRY_S * turn)
    return best if best.threads else answer


def _now(process: _Process) -> _Process | None:
    """The same process as it is now, which may have given itself a name; None once it has ended."""
    stat = read_stat(process.stat.pid)
    if stat is None or not stat.alive or stat.started != process.stat.started:
        return None
    return replace(process, stat=stat)


def _without_python(process: _Process, trouble: str) -> _Look:
    stat = process.stat
    main = _stack(stat, py_spy.Thread(stat.pid))
    if process.python is False:
        return _Look(stacks=(main,))
    return _Look(stacks=(main,), who=f"pid {stat.pid} ({stat.name})", trouble=trouble)


def _stack(stat: Stat, thread: py_spy.Thread) -> Stack:
    task = PROC / str(stat.pid) / "task" / str(thread.number)
    state = waits_in = ""
    with contextlib.suppress(OSError, IndexError):  # the thread has ended
        state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0].decode()
        waits_in = (task / "wchan").read_text()
    return Stack(
        pid=stat.pid,
        thread=thread.number,
        process=stat.name,
        name=thread.name,
        state=state,
        frames=thread.frames,
        waits_in="" if waits_in == "0" else waits_in,
    )


def _why_denied(pid: int) -> str:
    try:
        owner = (PROC / str(pid)).stat().st_uid
        # What lies in the folder belongs to root while the process is not dumpable (man 5 proc).
        dumpable = (PROC / str(pid) / "stat").stat().st_uid == owner
    except OSError:  # it has ended
        return ""
    return why_denied(us=os.geteuid(), owner=owner, dumpable=dumpable, scope=_ptrace_scope())


def why_denied(*, us: int, owner: int, dumpable: bool, scope: int) -> str:
    """Why ptrace is not allowed, and what allows it: `us` and `owner` are the users of the daemon and of the process,
    `scope` is kernel.yama.ptrace_scope (0 also where the kernel has no Yama)."""
    if us not in (0, owner):
        return f"it runs as uid {owner}, the daemon as uid {us}; run both as one user"
    if not dumpable:
        return f"it has made itself not dumpable; {PTRACE_FIX}"
    if scope >= 3:
        return f"kernel.yama.ptrace_scope={scope} lets nobody look into any process until the next boot; boot with 0"
    if scope:
        return (
            f"kernel.yama.ptrace_scope={scope} lets nobody look into the engine's processes; set it to 0 (sysctl), or"
            f" {PTRACE_FIX}"
        )
    return f"ptrace is not allowed; {PTRACE_FIX}"


def _ptrace_scope() -> int:
    try:
        return int(YAMA.read_text())
    except (OSError, ValueError):
        return 0


def _reason(looks: Sequence[_Look]) -> str:
    """One line for the operator: each trouble with those who have it."""
    found: dict[str, list[str]] = {}
    for look in looks:
        if look.trouble:
            found.setdefault(look.trouble, []).append(look.who)
    return "; ".join(f"cannot read the Python frames of {_few(whose)}: {trouble}" for trouble, whose in found.items())


def _few(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
