"""Daemons for mgpuctl to talk to: a real control server in a thread, and things that are no daemon at all."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mgpu_llm
from mgpu_llm.adapters.control_socket import RefusedError, UnknownError, WrongConfigError, serving
from mgpu_llm.adapters.incidents import Incidents, NoIncidentError
from mgpu_llm.core.status import RungStatus, Status
from tests.ctl.host_gpus import HOST_GPUS
from tests.ctl.samples import PLANS, RUNGS, STARTING

DEADLINE_S = 60.0


class SampleBackend:
    """Says what it was told to say; `then` holds the statuses that follow a request, one for each question."""

    def __init__(self, now: Status = STARTING) -> None:
        self.now = now
        self.then: list[Status] = []
        self.lines: tuple[str, ...] = ()
        self.ladder = RUNGS
        self.asked: list[tuple[str, str]] = []
        self.refusal = ""
        self.reloaded: dict[str, Any] = {"applied": [], "needs_restart": []}
        self.problems: list[str] = []
        self.host_gpus = HOST_GPUS
        self.driver_silent = ""
        self.kept = Incidents(None, keep=0, max_bytes=0)
        self.questions = 0
        self._requested = False

    def status(self) -> Status:
        self.questions += 1
        if self._requested and self.then:
            self.now = self.then.pop(0)
        return self.now

    def rungs(self) -> tuple[RungStatus, ...]:
        return self.ladder

    def plan(self, cause: str) -> dict[str, Any]:
        if cause not in PLANS:
            raise ValueError(f'there is no cause "{cause}"')
        return PLANS[cause]

    def engine_lines(self, count: int) -> tuple[str, ...]:
        return self.lines[-count:]

    async def reload(self, by: str) -> dict[str, Any]:
        if self.problems:
            raise WrongConfigError(self.problems)
        if self.refusal:
            raise RefusedError(self.refusal)
        self.asked.append(("reload", by))
        return self.reloaded

    async def gpus(self) -> dict[str, Any]:
        if self.driver_silent:
            raise RefusedError(self.driver_silent)
        return self.host_gpus

    async def incidents(self) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.kept.listed)

    async def incident(self, wanted: str) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(self.kept.document, wanted)
        except NoIncidentError as error:
            raise UnknownError(str(error)) from None

    async def incident_archive(self, wanted: str) -> tuple[str, bytes]:
        try:
            return await asyncio.to_thread(self.kept.archive, wanted)
        except NoIncidentError as error:
            raise UnknownError(str(error)) from None

    def request(self, verb: str, by: str) -> str:
        if self.refusal:
            raise RefusedError(self.refusal)
        self.asked.append((verb, by))
        self._requested = True
        return f"{verb} accepted"


@contextmanager
def daemon(runtime_dir: Path, backend: SampleBackend) -> Iterator[Path]:
    """The control server that the daemon has, on its own loop in a thread; gives the socket's path."""
    loop = asyncio.new_event_loop()
    up, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serving(runtime_dir, backend):
            up.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert up.wait(DEADLINE_S)
        yield runtime_dir / "control.sock"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(DEADLINE_S)
        loop.close()


@contextmanager
def foreign(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[Path]:
    """Something that listens and is no mgpud: `answer` is given each connection, which is closed afterwards."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        continue  # the client hung up first

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


def says(reply: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(reply)

    return answer


def http_reply(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def command(*args: str) -> Sequence[str]:
    return (sys.executable, "-m", "mgpu_llm.ctl", *args)


def environment(**more: str) -> Mapping[str, str]:
    # An unbuffered Python takes a short write for a whole one, and would not notice that its reader left.
    ours = ("NO_COLOR", "MGPU_LLM_SOCKET", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": str(Path(mgpu_llm.__file__).parents[1]), "TERM": "xterm", **more}


def mgpuctl(socket_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("--socket", str(socket_path), *args),
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def wait_for(met: Callable[[], bool], what: str) -> None:
    """Polls until it is so; AssertionError naming `what` if it never is."""
    ends = time.monotonic() + DEADLINE_S
    while not met():
        assert time.monotonic() < ends, f"never came: {what}"
        time.sleep(0.02)
