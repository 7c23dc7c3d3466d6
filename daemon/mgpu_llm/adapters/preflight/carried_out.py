"""What must come to its end although whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def carried_out(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. Whoever cancels this gets through once it has ended, however often he tries."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # so that it counts as looked at
        raise cancelled
    return task.result()
