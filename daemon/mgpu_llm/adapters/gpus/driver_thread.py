"""The one thread in which every call of the driver runs, and how long a caller waits for it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from mgpu_llm.adapters.gpus.told import GpusUnobserved

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class _Call:
    work: Callable[[], Any]
    asked_at: float
    answer: Future[Any] = field(default_factory=Future)
    overdue: bool = False


class DriverThread:
    """One thread of our own: an executor's are joined when the interpreter exits, and a stuck one never ends."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._running: _Call | None = None
        threading.Thread(target=self._serve, name="nvml", daemon=True).start()

    async def call(self, work: Callable[[], T], deadline_s: float) -> T:
        """What `work` returns or raises, or GpusUnobserved when that has not come after `deadline_s`."""
        clock = asyncio.get_running_loop().time
        running = self._running
        if running is not None and running.overdue:
            raise GpusUnobserved(_silence(clock() - running.asked_at))
        call = _Call(work=work, asked_at=clock())
        self._calls.put(call)
        try:
            async with asyncio.timeout(deadline_s):
                result: T = await asyncio.wrap_future(call.answer)
                return result
        except TimeoutError:
            # What blocks the thread is our call, or one before it; a later one has its own deadline.
            running = self._running
            culprit = running if running is not None and running.asked_at <= call.asked_at else call
            culprit.overdue = True
            raise GpusUnobserved(_silence(clock() - culprit.asked_at)) from None

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            if not call.answer.set_running_or_notify_cancel():
                continue  # it waited behind an overdue call, and its caller is gone
            self._running = call
            deliver = _attempt(call)
            # First free, then answered: who gets the answer may call again at once.
            self._running = None
            deliver()


def _attempt(call: _Call) -> Callable[[], None]:
    try:
        result = call.work()
    except BaseException as error:  # noqa: BLE001 - it is the caller's, and the thread must outlive it
        failure = error
        return lambda: call.answer.set_exception(failure)
    return lambda: call.answer.set_result(result)


def _silence(silent_s: float) -> str:
    return f"the NVIDIA driver has not answered for {silent_s:.{1 if silent_s < 10 else 0}f} s"
