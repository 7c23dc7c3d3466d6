"""What an engine leaves on disk and in shared memory: written down while it runs, and out of the way before the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import structlog

from mgpu_llm.adapters.engine import jit_locks
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.ledger import Ledger

#: Seconds between looks at the names in /dev/shm: an engine makes its files within moments, and keeps them.
EVERY_S: Final = 2.0
LOOK_S: Final = 5.0
#: Caches may be on a slow disk, or on one that is gone.
CACHES_S: Final = 10.0

log = structlog.get_logger()


class Remains:
    """`pids` are the engine's own processes now."""

    def __init__(self, ledger: Ledger, pids: Callable[[], tuple[int, ...]]) -> None:
        self._ledger = ledger
        self._pids = pids

    async def before_spawn(self, environment: Mapping[str, str]) -> None:
        """Remove locks of killed compiles for which an engine in this environment would wait; no engine of ours runs."""
        caches = jit_locks.caches(environment)
        for what in await aside(partial(jit_locks.remove_stale, caches), CACHES_S) or ():
            log.warning("engine.stale-lock", what=what)
        await aside(self._ledger.begin, LOOK_S)

    async def watch(self) -> None:
        """Write down what the engine holds in /dev/shm, until cancelled."""
        while True:
            if new := await aside(self._ledger.new, LOOK_S):
                await aside(partial(self._ledger.look, new, self._pids()), LOOK_S)
            await asyncio.sleep(EVERY_S)

    async def gone(self) -> None:
        """The engine is gone, and what it left is removed."""
        await aside(self._ledger.clear, LOOK_S)
