"""Lives of mgpud over the fake engine: begun as an operator begins them, ended whatever happens, and searched for remains."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgpu_llm.adapters.engine import tags
from tests.support.daemons import POLL_S, Daemon, processes_of
from tests.support.fake_setup import FakeSetup

#: How long a failing test waits; a passing one never does.
LIMIT_S = 60.0
#: Events that tell nothing of how a life went: on a busy machine any load may be suspected for a moment.
COMMON = frozenset({"daemon.started", "engine.command", "engine.phase", "engine.suspected", "engine.cleared"})


class Life(Daemon):
    """One mgpud over the fake engine."""

    def __init__(self, setup: FakeSetup, log: Path, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(setup.config_file, setup.socket, log, environ)
        self.setup = setup

    def ready(self) -> dict[str, Any]:
        return self.wait_until("ready", LIMIT_S)

    def ended(self) -> int:
        """The exit status, once it ends by itself."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it never ended; the log ends:\n{self.log()[-6000:]}") from None

    def wait_log(self, piece: str, count: int = 1) -> None:
        """Until the log holds `piece` so many times."""
        until(f"{count} x {piece!r} in the log", lambda: self.log().count(piece) >= count, self.log)

    def told(self, event: str) -> list[str]:
        """The daemon's own lines of one event, in order."""
        return [line for line in self.events() if line.split()[0] == event]

    def story(self) -> list[str]:
        """The names of the daemon's own events, in order, without what every life has."""
        names = [line.split()[0] for line in self.events()]
        return [name for name in names if name not in COMMON]


@contextmanager
def living(setup: FakeSetup, environ: Mapping[str, str] | None = None, *, log: str = "log") -> Iterator[Life]:
    """A daemon under `setup`. Whatever a failing test leaves of it and its engines is ended."""
    setup.write()
    life = Life(setup, setup.folder / log, environ)
    try:
        yield life
    finally:
        end(life)


def end(life: Life) -> None:
    if life.process.poll() is None:
        life.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            life.process.wait(30)
        life.process.kill()
        life.process.wait()
    for _ in range(100):
        left = processes_of(life.setup.runtime_dir)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split()[0]), signal.SIGKILL)
        if not left:
            break
        time.sleep(0.05)
    for file in life.setup.memory():
        file.unlink(missing_ok=True)


def remains(setup: FakeSetup) -> list[str]:
    """Everything that a daemon which has ended ought to have taken with it: processes, shared memory, sockets."""
    sockets = Path("/tmp").glob(f"mgpu-llm-{tags.prefix(setup.runtime_dir)[:-1]}-*")
    files = [*setup.memory(), *sockets, *(file for file in setup.runtime_dir.iterdir() if file.name != "mgpud.lock")]
    return [*processes_of(setup.runtime_dir), *map(str, files)]


def until(what: str, holds: Callable[[], bool], log: Callable[[], str] = str) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"waited {LIMIT_S} s in vain for {what}\n{log()[-6000:]}")
        time.sleep(POLL_S)


def environ_of(pid: int) -> dict[str, str]:
    """The environment with which a process was begun."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def argv_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def causes(status: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(rung, outcome, cause) of each attempt that is over."""
    ended = [attempt for attempt in status["attempts"] if attempt["outcome"] not in ("running", "ready")]
    return [(attempt["rung"], attempt["outcome"], attempt["cause"]) for attempt in ended]


def fact(line: str, name: str) -> str:
    """The value of one fact in a line of the log."""
    found = re.search(rf'\b{name}=(?:"((?:[^"\\]|\\.)*)"|(\S+))', line)
    assert found is not None, line
    return found[1] if found[1] is not None else found[2]
