"""py-spy (0.4) asked for the Python threads of one process, without stopping it.

Its mode that does not pause what it reads is always right about a thread that stands still. One that runs may be caught
in the middle of a step: py-spy then gives up, or the stack is torn, with its outer frames missing. So it is asked again.
How often, of a loop that polls through generators, as older vLLM waits for its peers: given up 22 %, torn 12 % under
Python 3.11; 42 % and 11 % under 3.12; 13 % and 50 % under 3.13. Of vLLM 0.32 while it loads, Python 3.11: given up 5 %.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

#: Of a process of hundreds of threads, each with hundreds of frames, py-spy tells less.
MOST_BYTES = 8 << 20
CHUNK_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
NO_ANSWER = "it does not answer: it may be stuck in the driver"


class Thread(NamedTuple):
    """`number` is the kernel's, `frames` are innermost first, as in `core.events.Stack`."""

    number: int
    name: str = ""
    frames: tuple[str, ...] = ()
    torn: bool = False


class _TooLongError(Exception):
    pass


class Answer(NamedTuple):
    """`trouble` says why there are no threads. `again`: another try may have more luck. `denied`: ptrace is not allowed."""

    threads: tuple[Thread, ...] = ()
    trouble: str = ""
    again: bool = False
    denied: bool = False


def find() -> Path | None:
    """The program py-spy of this environment, else of PATH; None where there is none."""
    own = Path(sysconfig.get_path("scripts"), "py-spy")
    if os.access(own, os.X_OK):
        return own
    found = shutil.which("py-spy")
    return None if found is None else Path(found)


class Spies:
    """The py-spies that run now. `ask` and `wait` block and belong to worker threads."""

    def __init__(self, program: Path | None) -> None:
        self._program = program
        self._changed = threading.Condition()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._asked = 0
        self._over = False

    def ask(self, pid: int, limit_s: float) -> Answer:
        """One answer of one py-spy, which is killed after `limit_s` and then waited for: that may take for ever."""
        if self._program is None:
            return Answer(trouble="py-spy is missing; install it beside the daemon: pip install py-spy")
        with self._changed:
            if self._over:
                return Answer(trouble=NO_ANSWER)
            self._asked += 1
        try:
            return _understand(pid, *self._run(self._program, pid, limit_s))
        except subprocess.TimeoutExpired:
            return Answer(trouble=NO_ANSWER)
        except _TooLongError:
            return Answer(trouble=f"py-spy says more than {MOST_BYTES >> 20} MiB")
        except OSError as error:
            return Answer(trouble=f"cannot run '{self._program}': {error.strerror}")
        finally:
            with self._changed:
                self._asked -= 1
                self._changed.notify_all()

    def _run(self, program: Path, pid: int, limit_s: float) -> tuple[int, bytes, bytes]:
        argv = [str(program), "dump", "--pid", str(pid), "--json", "--nonblocking"]
        us, pipe = os.getpid(), subprocess.PIPE
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env={},
            preexec_fn=lambda: _end_with(us),
        ) as popen:
            with self._changed:
                self._running.add(popen)
                if self._over:
                    popen.kill()
            try:
                answer, complaint = _outputs(popen, limit_s)
            finally:
                popen.kill()
                popen.wait()
                with self._changed:
                    self._running.discard(popen)
        return popen.returncode, answer, complaint

    def kill(self) -> None:
        """End all and start none any more."""
        with self._changed:
            self._over = True
            for popen in self._running:
                popen.kill()

    def wait(self) -> None:
        """Until all have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked)


def _end_with(parent: int) -> None:
    """In the child, where only system calls are safe: be killed when the thread that began it ends (prctl(2)). That waits
    for it, and so ends first only when the daemon is killed; nobody else would end a py-spy that waits for a stuck process."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _outputs(popen: subprocess.Popen[bytes], limit_s: float) -> tuple[bytes, bytes]:
    """All of its stdout and stderr, and its end. Raises subprocess.TimeoutExpired, and _TooLongError beyond MOST_BYTES."""
    end, left = time.monotonic() + limit_s, MOST_BYTES
    answer, complaint = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for output, read in ((popen.stdout, answer), (popen.stderr, complaint)):
            if output is not None:
                selector.register(output, selectors.EVENT_READ, read)
        while selector.get_map():
            if (left_s := end - time.monotonic()) <= 0:
                raise subprocess.TimeoutExpired(popen.args, limit_s)
            for key, _ in selector.select(left_s):
                chunk = os.read(key.fd, CHUNK_BYTES)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                left -= len(chunk)
                if left < 0:
                    raise _TooLongError
    popen.wait(max(0.0, end - time.monotonic()))
    return bytes(answer), bytes(complaint)


def _understand(pid: int, status: int, answer: bytes, complaint: bytes) -> Answer:
    if status < 0:
        return Answer(trouble=f"py-spy was ended by signal {-status}")
    if status > 0:
        return _refusal(complaint.decode("utf-8", "replace"))
    try:
        found = json.loads(answer)
        threads = tuple(_thread(pid, thread, len(found)) for thread in found)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return Answer(trouble=f"py-spy answers in other words than version 0.4 ({type(error).__name__})")
    return Answer(threads, again=any(thread.torn for thread in threads))


def _refusal(complaint: str) -> Answer:
    """From "Error: Failed to get stack traces", "Caused by:", "0: Failed to copy PyFrameObject", and a backtrace."""
    lines = [line.strip() for line in complaint.partition("Stack backtrace:")[0].splitlines()]
    said = [line.removeprefix("Error: ").removeprefix("0: ") for line in lines if line and line != "Caused by:"]
    low = complaint.lower()
    denied = "permission denied" in low or "operation not permitted" in low
    final = denied or "unsupported version" in low
    return Answer(trouble="py-spy says: " + ", ".join(said[:2]), again=not final, denied=denied)


def _thread(pid: int, said: dict[str, Any], count: int) -> Thread:
    """Raises ValueError, LookupError, TypeError and AttributeError for what py-spy 0.4 does not say."""
    name = _text(said["thread_name"] or "")
    # Of Python before 3.11 the kernel's number is not known without a pause; Python's own tells threads apart as well.
    other = pid if name == "MainThread" or count == 1 else said["thread_id"]
    number = said["os_thread_id"] or other
    if not isinstance(number, int) or not 0 < number < 1 << 63:
        raise TypeError("it is no number of a thread")
    frames = tuple(_frame(frame) for frame in said["frames"])
    outermost = _text(said["frames"][-1]["name"]) if frames else ""
    whole = outermost in ("<module>", "_run_module_as_main") or outermost.endswith("_bootstrap")
    return Thread(number, name, frames, torn=bool(said["active"]) and not whole)


def _frame(said: dict[str, Any]) -> str:
    path = "/".join(_text(said["filename"]).split("/")[-3:])
    return f"{_text(said['name'])} ({path}:{int(said['line'])})"


def _text(value: object) -> str:
    """Of half a character, which JSON can write and nobody can print, a mark is left."""
    if not isinstance(value, str):
        raise TypeError("it is no text")
    return value.encode("utf-8", "replace").decode()
