"""Work that may wait on a stuck process, done beside the loop and left behind when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def answered(work: Callable[[], T], limit_s: float) -> T:
    """What `work` returns or raises; TimeoutError after `limit_s`. Its thread then goes on alone."""

    def outcome() -> tuple[T] | Exception:
        try:
            return (work(),)
        except Exception as error:  # noqa: BLE001 - raised again where it belongs
            return error

    done = await aside(outcome, limit_s)
    if done is None:
        raise TimeoutError
    if isinstance(done, Exception):
        raise done
    return done[0]


async def aside(work: Callable[[], T], limit_s: float) -> T | None:
    """What `work` returns, or None after `limit_s`; its thread then goes on alone and does not hold up our exit. None at once
    where no thread can be started (a pids limit that the engine fills).

    `work` must not raise. (The loop's own executor is no way to do this: its threads are waited for at exit.)
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if not done.done():
            done.set_result(result)

    def run() -> None:
        result = work()
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(deliver, result)

    try:
        threading.Thread(target=run, name="aside", daemon=True).start()
    except RuntimeError:
        return None
    try:
        # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(limit_s):
            return await done
    except TimeoutError:
        return None
