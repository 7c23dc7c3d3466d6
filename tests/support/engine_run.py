"""A real EngineProcess for tests: its events collected, waiting with deadlines, and everything ended at the end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from mgpu_llm.adapters.engine.process import EngineProcess, adopt_orphans
from mgpu_llm.core.events import EngineEvent, EngineStuck, LineRead

E = TypeVar("E")
#: Long enough for a noisy machine; nothing waits this long when all is well.
LIMIT_S = 30.0


async def until(what: str, holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s} s in vain until {what}")
        await asyncio.sleep(0.01)


class Run:
    """One EngineProcess and what it told."""

    def __init__(self, runtime_dir: Path, cgroup: Path | None = None) -> None:
        self.events: list[EngineEvent] = []
        self.engine = EngineProcess(
            clock=time.monotonic, emit=self.events.append, runtime_dir=runtime_dir, cgroup=cgroup
        )

    def all(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def lines(self) -> list[str]:
        return [event.text for event in self.all(LineRead)]

    async def first(self, kind: type[E]) -> E:
        await until(f"a {kind.__name__} comes", lambda: bool(self.all(kind)))
        return self.all(kind)[0]

    async def line(self, piece: str) -> str:
        await until(f"a line with {piece!r} comes", lambda: any(piece in line for line in self.lines))
        return next(line for line in self.lines if piece in line)

    async def python(self, code: str, attempt: int = 1, env: Mapping[str, str] | None = None) -> None:
        """Spawns a Python that runs `code`."""
        await self.engine.spawn(attempt, (sys.executable, "-S", "-c", code), {**os.environ, **(env or {})})


@asynccontextmanager
async def running(runtime_dir: Path, cgroup: Path | None = None) -> AsyncIterator[Run]:
    run = Run(runtime_dir, cgroup)
    try:
        yield run
    finally:
        await run.engine.kill(LIMIT_S)
        # Without a cgroup the engine makes its process the parent of orphans. Here that is pytest, which must not stay it: a
        # booted systemd cannot end while a process of its namespace is a zombie that its adopter outside does not reap.
        adopt_orphans(False)
        assert not run.all(EngineStuck) or run.engine.pids() == ()
