"""Where every thread of the engine's processes stands, taken from outside, without stopping any of them.

Python frames come from py-spy (0.4), one short-lived process for each of the engine's, in its mode that does not pause
what it reads. A thread that stands still is always read right; one that runs may be read in the middle of a step: then its
frames mix two moments, or py-spy gives up and is asked again. What the kernel says comes from /proc/PID/task/TID/stat and
wchan, which wait for no lock of the process. py-spy may wait for one (it reads maps and memory): it is left behind then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.tree import PROC, Stat, read_stat
from mgpu_llm.core.events import Stack

#: So many processes are looked into at once; one that is slow gives its place away, since it only waits.
AT_ONCE = 2
SLOW_S = 1.0
#: A running process may be caught in the middle of a step.
TRIES = 6
RETRY_S = 0.03
#: How long the end of a killed py-spy is waited for. Longer takes only one that waits for a lock of a stuck process.
END_S = 1.0
#: So many processes are named in a reason.
NAMED = 3
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class _Thread(NamedTuple):
    number: int
    name: str = ""
    frames: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was seen of one process. `trouble` says why its Python frames could not be had, if it runs Python."""

    stacks: tuple[Stack, ...] = ()
    who: str = ""
    trouble: str = ""


async def take(pids: Sequence[int], deadline_s: float = 10.0) -> tuple[tuple[Stack, ...], str]:
    """The threads of these processes, process after process, each one's main thread first, and why the Python frames of some
    Python processes could not be had ("" when all were).

    A process that runs no Python, or that may not be looked into, gives its main thread as the kernel sees it. Those that
    have ended are left out. Takes at most `deadline_s` and a second. Stops no process and raises nothing. No py-spy is left
    afterwards, unless it waits in the kernel for a lock that a stuck process holds: it has been sent SIGKILL.
    """
    end = time.monotonic() + deadline_s
    spies = _Spies(await aside(find_py_spy, deadline_s))
    slots = asyncio.Semaphore(AT_ONCE)
    try:
        looks = await asyncio.gather(*(_look_in_turn(pid, spies, slots, end) for pid in pids))
    finally:
        spies.kill()
        await aside(spies.wait, END_S)
    return tuple(stack for look in looks for stack in look.stacks), _reason(looks)


def find_py_spy() -> Path | None:
    """The program py-spy of this environment, else of PATH; None where there is none."""
    own = Path(sysconfig.get_path("scripts"), "py-spy")
    if os.access(own, os.X_OK):
        return own
    found = shutil.which("py-spy")
    return None if found is None else Path(found)


class _Spies:
    """The py-spies of one take. `dump` and `wait` block and belong to worker threads."""

    def __init__(self, program: Path | None) -> None:
        self.program = program
        self._changed = threading.Condition()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._busy = 0
        self._over = False

    def dump(self, pid: int, limit_s: float) -> tuple[int, bytes, str]:
        """One answer of py-spy: its exit status, the stacks as JSON, and its complaint. Raises OSError where it cannot
        be run, and TimeoutError after `limit_s` or once the take is over."""
        with self._changed:
            if self._over:
                raise TimeoutError
            self._busy += 1
        try:
            return self._dump(pid, limit_s)
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _dump(self, pid: int, limit_s: float) -> tuple[int, bytes, str]:
        argv = [str(self.program), "dump", "--pid", str(pid), "--json", "--nonblocking"]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env={}) as popen:
            with self._changed:
                self._running.add(popen)
                if self._over:
                    popen.kill()
            try:
                answer, complaint = popen.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.communicate()
                raise TimeoutError from None
            finally:
                with self._changed:
                    self._running.discard(popen)
        return popen.returncode, answer, complaint.decode("utf-8", "replace")

    def kill(self) -> None:
        with self._changed:
            self._over = True
            for popen in self._running:
                popen.kill()

    def wait(self) -> None:
        """Until all have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)


async def _look_in_turn(pid: int, spies: _Spies, slots: asyncio.Semaphore, end: float) -> _Look:
    async with slots:
        first = await aside(lambda: read_stat(pid), max(0.0, end - time.monotonic()))
        if first is None or not first.alive:
            return _Look()
        left_s = max(0.0, end - time.monotonic())
        # A little longer than the work itself waits, so that its own word comes first.
        look = asyncio.create_task(aside(lambda: _look(first, spies, left_s), left_s + 0.1))
        await asyncio.wait({look}, timeout=SLOW_S)
    return await look or _without_python(first, "it does not answer: it may be stuck in the driver")


def _look(first: Stat, spies: _Spies, limit_s: float) -> _Look:
    threads, trouble = _ask(first, spies, limit_s)
    now = read_stat(first.pid)
    if now is None or _ended(first):
        return _Look()
    if not threads:
        return _without_python(now, trouble)
    if now.pid not in {thread.number for thread in threads}:
        threads = (_Thread(now.pid), *threads)
    ordered = sorted(threads, key=lambda thread: (thread.number != now.pid, thread.number))
    return _Look(stacks=tuple(_stack(now, thread) for thread in ordered))


def _ended(stat: Stat) -> bool:
    now = read_stat(stat.pid)
    return now is None or not now.alive or now.started != stat.started


def _without_python(stat: Stat, trouble: str) -> _Look:
    main = _stack(stat, _Thread(stat.pid))
    return _Look(stacks=(main,), who=f"pid {stat.pid} ({stat.name})", trouble=trouble)


def _ask(stat: Stat, spies: _Spies, limit_s: float) -> tuple[tuple[_Thread, ...], str]:
    """The Python threads, or why there are none; neither for a process that runs no Python."""
    end = time.monotonic() + limit_s
    python = _runs_python(stat.pid)
    if spies.program is None:
        return (), "" if python is False else "py-spy is missing; install it beside the daemon: pip install py-spy"
    trouble = ""
    for turn in range(TRIES):
        try:
            status, answer, complaint = spies.dump(stat.pid, max(0.0, end - time.monotonic()))
        except TimeoutError:
            return (), "it does not answer: it may be stuck in the driver"
        except OSError as error:
            return (), f"cannot run '{spies.program}': {error.strerror}"
        if status == 0:
            return _threads(answer)
        if python is False or _ended(stat):
            return (), ""
        if _is_denial(complaint):
            return (), _why_denied(stat.pid)
        trouble = _in_short(status, complaint)
        if status < 0 or "Unsupported version" in complaint:
            break
        time.sleep(min(RETRY_S * (turn + 1), max(0.0, end - time.monotonic())))
    return (), trouble


def _runs_python(pid: int) -> bool | None:
    """By the name of its program; None where that may not be seen. (A link to the program waits for no lock.)"""
    try:
        program = (PROC / str(pid) / "exe").readlink()
    except OSError:
        return None
    return program.name.startswith(("python", "pypy"))


def _threads(answer: bytes) -> tuple[tuple[_Thread, ...], str]:
    try:
        found = json.loads(answer)
        threads = [
            _Thread(
                # Before Python 3.11 the kernel's number is not always found; Python's own tells threads apart as well.
                number=thread["os_thread_id"] or thread["thread_id"],
                name=thread["thread_name"] or "",
                frames=tuple(_frame(frame) for frame in thread["frames"]),
            )
            for thread in found
        ]
    except (ValueError, KeyError, TypeError) as error:
        return (), f"py-spy answers in other words than version 0.4 ({type(error).__name__})"
    return tuple(threads), ""


def _frame(frame: dict[str, object]) -> str:
    path = "/".join(str(frame["filename"]).split("/")[-3:])
    return f"{frame['name']} ({path}:{frame['line']})"


def _stack(stat: Stat, thread: _Thread) -> Stack:
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


def _is_denial(complaint: str) -> bool:
    return "permission denied" in complaint.lower() or "operation not permitted" in complaint.lower()


def _why_denied(pid: int) -> str:
    us = os.geteuid()
    try:
        owner = (PROC / str(pid)).stat().st_uid
        # What lies in the folder belongs to root while the process is not dumpable (man 5 proc).
        dumpable = (PROC / str(pid) / "stat").stat().st_uid == owner
    except OSError:
        return "ptrace is not allowed"
    scope = _ptrace_scope()
    if owner != us:
        return f"it belongs to uid {owner}, and the daemon is uid {us}; run both as one user"
    if not dumpable:
        return "it is not dumpable; give the daemon CAP_SYS_PTRACE (AmbientCapabilities= of its unit)"
    if scope >= 3:
        return f"kernel.yama.ptrace_scope={scope} forbids it to everybody; boot with 0"
    if scope:
        return (
            f"kernel.yama.ptrace_scope={scope} lets nobody look into the engine's processes; set it to 0 (sysctl), or give"
            " the daemon CAP_SYS_PTRACE (AmbientCapabilities= of its unit)"
        )
    return (
        "ptrace is not allowed; give the daemon CAP_SYS_PTRACE (AmbientCapabilities= of its unit, --cap-add of docker)"
    )


def _ptrace_scope() -> int:
    """0 where the kernel has no Yama."""
    try:
        return int(YAMA.read_text())
    except (OSError, ValueError):
        return 0


def _in_short(status: int, complaint: str) -> str:
    """The error of py-spy and its first cause, of the several lines that it prints."""
    if status < 0:
        return f"py-spy was ended by signal {-status}"
    lines = [line.strip() for line in complaint.partition("Stack backtrace:")[0].splitlines()]
    said = [line.removeprefix("Error: ").removeprefix("0: ") for line in lines if line and line != "Caused by:"]
    return "py-spy says: " + ", ".join(said[:2])


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
