"""The probe as a process: spawned, told what to do, listened to, and gone at the end with all that it has forked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.preflight.carried_out import carried_out

PROBE: Final = Path(__file__).with_name("probe.py")
#: Neither the folder that the daemon is in nor that of the probe is a place of the engine's.
BOOT: Final = """\
import runpy, sys
sys.path[:] = [place for place in sys.path if place]
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
#: By this whatever is loaded into the probe from its environment knows where it is.
VARIABLE: Final = "MGPU_LLM_PREFLIGHT"
WORDS: Final = 50
LONGEST_WORD: Final = 1000
#: How long the probe may take to kill and bury its own, and how long what outlives SIGKILL is waited for.
BURIED_S: Final = 5.0
STUCK_S: Final = 10.0
PASS_S: Final = 0.02

Message = dict[str, Any]


class Program:
    """One probe. Make it with `begin`; `end` must follow, whatever happens. All of it belongs to the loop's thread."""

    def __init__(self, popen: subprocess.Popen[bytes], heard: int) -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._pipes = [heard, _descriptor(popen.stdout)]
        self._cut = dict.fromkeys(self._pipes, b"")
        self._messages: deque[Message] = deque()
        self._news = asyncio.Event()
        self._ended = False
        #: Before its first order it has nobody to bury, and does not listen.
        self._ordered = False
        #: The last lines that it printed, whoever of it did.
        self.words: deque[str] = deque(maxlen=WORDS)
        loop = asyncio.get_running_loop()
        self._takes = dict(zip(self._pipes, (self._hear, self._keep), strict=True))
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            loop.add_reader(pipe, self._read, pipe)
        loop.add_reader(self._pidfd, self._notice_end)

    def tell(self, order: Mapping[str, Any]) -> None:
        """Does nothing where the probe has ended, which `messages` tells."""
        self._ordered = True
        with contextlib.suppress(OSError):
            os.write(_descriptor(self._popen.stdin), json.dumps(order).encode() + b"\n")

    async def messages(self, limit_s: float) -> tuple[list[Message], bool]:
        """What it has said, waiting for more up to `limit_s`, and whether it has ended and will say no more."""
        if not self._messages and not self._ended:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the news.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._news.wait()
        self._news.clear()
        said, ended = list(self._messages), self._ended
        self._messages.clear()
        return said, ended

    async def end(self) -> tuple[str, ...]:
        """Returns once no process of it is left, or names those that outlive SIGKILL. To be called once."""
        with contextlib.suppress(OSError):
            self._popen.stdin.close()  # type: ignore[union-attr]  # it was made with a pipe
        if not self._ordered or not await _until(lambda: self._ended, BURIED_S):
            self._kill_all()
        stuck: tuple[str, ...] = ()
        if not await _until(lambda: not self._members(), STUCK_S, self._kill_all):
            stuck = tuple(self._members())
        self._close()
        return stuck

    def _kill_all(self) -> None:
        # The zombie of the first one keeps its number, and so that of the session, its own until it is waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def _members(self) -> list[str]:
        """Those of its session that are more than a zombie, as "python (123)"."""
        members = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    name, rest = (entry / "stat").read_text(errors="replace").rsplit(")", 1)
                    state, _, _, session, *more = rest.split()
                    # Field 20 counts the threads: some may still hold a GPU when the first one is a zombie (man 5 proc).
                    gone = state in "ZX" and int(more[13]) <= 1
                    if int(session) == self._popen.pid:
                        if not gone:
                            members.append(f"{name.split('(', 1)[1]} ({entry.name})")
                        elif int(entry.name) != self._popen.pid:
                            _bury(int(entry.name))
        return members

    def _close(self) -> None:
        loop = asyncio.get_running_loop()
        for pipe in (*self._pipes, self._pidfd):
            loop.remove_reader(pipe)
        os.close(self._pidfd)
        os.close(self._pipes[0])
        self._popen.stdout.close()  # type: ignore[union-attr]
        self._popen.poll()

    def _read(self, pipe: int) -> None:
        try:
            came = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            came = b""
        if not came:
            asyncio.get_running_loop().remove_reader(pipe)
        *lines, cut = (self._cut[pipe] + came).split(b"\n")
        self._cut[pipe] = cut[: 1 << 16]
        for line in lines:
            self._takes[pipe](line.decode("utf-8", "replace"))

    def _keep(self, line: str) -> None:
        self.words.append(line[:LONGEST_WORD].rstrip("\r"))

    def _hear(self, line: str) -> None:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                self._messages.append(message)
                self._news.set()

    def _notice_end(self) -> None:
        if os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        for pipe in self._pipes:
            self._read(pipe)
        self._ended = True
        self._news.set()


async def begin(python: Sequence[str], environment: Mapping[str, str]) -> Program:
    """A probe run by `python` in `environment`, in a session of its own. Raises OSError, ValueError or RuntimeError (no
    thread more, as under a pids limit) where it cannot be started."""
    heard, told = os.pipe()

    spawned: list[subprocess.Popen[bytes]] = []

    def spawn() -> None:
        popen = subprocess.Popen(
            [*python, "-c", BOOT, str(PROBE), str(told), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, VARIABLE: "1"},
            pass_fds=(told,),
            start_new_session=True,
        )
        spawned.append(popen)
        _first_to_go_without_memory(popen.pid)

    try:
        # Beside the loop: the disk that holds this Python may be dead. In a thread that lasts: with it the probe would die.
        await carried_out(asyncio.to_thread(spawn))
    except asyncio.CancelledError:
        for popen in spawned:
            await carried_out(Program(popen, heard).end())
        raise
    except (OSError, ValueError, RuntimeError):
        os.close(heard)
        raise
    finally:
        os.close(told)
    return Program(spawned[0], heard)


async def _until(true: Callable[[], bool], limit_s: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    while not true():
        if loop.time() >= end:
            return False
        meanwhile()
        await asyncio.sleep(PASS_S)
    return True


def _first_to_go_without_memory(pid: int) -> None:
    """The daemon may be protected from the kernel's OOM killer (OOMScoreAdjust); what it only tries out must not be."""
    with contextlib.suppress(OSError):
        if int(Path("/proc/self/oom_score_adj").read_text()) < 0:
            Path(f"/proc/{pid}/oom_score_adj").write_text("0")


def _bury(pid: int) -> None:
    """One that came to us when it lost its parent, for the daemon may be the parent of orphans."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _descriptor(pipe: Any) -> int:
    return int(pipe.fileno())
