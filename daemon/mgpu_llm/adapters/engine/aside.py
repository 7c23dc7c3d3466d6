"""Work that may wait on a stuck process, done beside the loop and left behind when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, Full, LifoQueue, SimpleQueue
from typing import Final, TypeVar

T = TypeVar("T")

#: So many threads wait for more work once theirs is done; the others end. Looking at a loading engine costs up to a tenth
#: more with a thread made anew for each look (tests/bench/sampler_cost.py).
KEPT: Final = 1


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

    def run() -> Callable[[], object]:
        result = work()
        return lambda: loop.call_soon_threadsafe(deliver, result)

    try:
        _hand_over(run)
    except RuntimeError:
        return None
    try:
        # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(limit_s):
            return await done
    except TimeoutError:
        return None


#: Work that returns how to deliver its result.
_Work = Callable[[], Callable[[], object]]
#: Where the threads that have nothing to do wait, each for its own work: nothing is ever put behind work that is stuck.
_waiting: LifoQueue[SimpleQueue[_Work]] = LifoQueue(KEPT)


def _hand_over(work: _Work) -> None:
    """To a thread that waits, else to a new one. Raises RuntimeError where none can be started."""
    try:
        inbox = _waiting.get_nowait()
    except Empty:
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="aside", daemon=True).start()
    inbox.put(work)


def _serve(inbox: SimpleQueue[_Work]) -> None:
    wanted = True
    while wanted:
        deliver = inbox.get()()
        # First free, then answered: who gets the answer may ask again at once.
        wanted = _waits(inbox)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            deliver()
        del deliver  # the result is not kept until there is more to do


def _waits(inbox: SimpleQueue[_Work]) -> bool:
    """Whether the thread is to wait for more."""
    try:
        _waiting.put_nowait(inbox)
    except Full:
        return False
    return True
