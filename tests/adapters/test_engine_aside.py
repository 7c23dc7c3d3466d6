"""Work beside the loop: it may never end, and then costs one thread and nobody's time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mgpu_llm.adapters.engine.aside import KEPT, answered, aside
from tests.support.engine_run import until

LIMIT_S = 20.0


class Stuck:
    """Work that waits in the kernel until it is let go."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def __call__(self) -> int:
        os.read(self._read, 1)
        return threading.get_ident()

    def let_go(self, times: int = 1) -> None:
        os.write(self._write, b"x" * times)


@contextmanager
def no_new_thread() -> Iterator[None]:
    before = threading.stack_size(1 << 45)  # more than there are addresses
    try:
        yield
    finally:
        threading.stack_size(before)


def threads() -> int:
    return sum(thread.name == "aside" for thread in threading.enumerate())


async def at_rest() -> None:
    await until("what others have left behind has ended", lambda: threads() <= KEPT)


def test_one_work_after_the_other_is_done_in_the_same_thread_and_not_in_the_loop_s() -> None:
    async def story() -> list[int | None]:
        return [await aside(threading.get_ident, LIMIT_S) for _ in range(20)]

    (thread,) = set(asyncio.run(story()))
    assert thread not in (None, threading.get_ident())


def test_the_thread_outlives_the_loop_whose_work_it_did() -> None:
    first = asyncio.run(aside(threading.get_ident, LIMIT_S))
    assert asyncio.run(aside(threading.get_ident, LIMIT_S)) == first


def test_work_that_never_ends_is_left_behind_and_nothing_waits_behind_it() -> None:
    stuck = Stuck()

    async def story() -> None:
        await at_rest()
        assert await aside(stuck, 0.05) is None
        with pytest.raises(TimeoutError):
            await answered(stuck, 0.05)
        assert await aside(lambda: "done", LIMIT_S) == "done"
        assert threads() == 3
        stuck.let_go(2)
        await at_rest()

    asyncio.run(story())


def test_of_many_threads_at_once_all_but_the_kept_end_with_their_work() -> None:
    stuck = Stuck()

    async def story() -> None:
        await at_rest()
        works = [asyncio.create_task(aside(stuck, LIMIT_S)) for _ in range(10)]
        await until("all are at work", lambda: threads() == 10)
        stuck.let_go(10)
        assert len(set(await asyncio.gather(*works))) == 10
        await at_rest()

    asyncio.run(story())


def test_where_no_thread_can_be_started_there_is_no_answer_and_no_wait_but_a_thread_that_is_free_goes_on() -> None:
    stuck = Stuck()

    async def story() -> None:
        await aside(int, LIMIT_S)
        await at_rest()
        with no_new_thread():
            assert await aside(lambda: "done", LIMIT_S) == "done"
            work = asyncio.create_task(aside(stuck, LIMIT_S))
            await asyncio.sleep(0)
            assert await asyncio.wait_for(aside(lambda: "done", 1e9), 5) is None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(answered(lambda: "done", 1e9), 5)
        stuck.let_go()
        await work

    asyncio.run(story())


def test_what_work_raises_is_raised_where_it_was_asked_for_and_its_thread_goes_on() -> None:
    def work() -> int:
        raise ValueError(threading.get_ident())

    async def story() -> None:
        with pytest.raises(ValueError) as raised:
            await answered(work, LIMIT_S)
        assert raised.value.args == (await aside(threading.get_ident, LIMIT_S),)

    asyncio.run(story())


def test_neither_a_thread_that_is_stuck_nor_one_that_waits_holds_up_the_end_of_the_program() -> None:
    program = """
import asyncio, os
from mgpu_llm.adapters.engine.aside import aside
async def story():
    stuck, _ = os.pipe()
    print(await aside(lambda: os.read(stuck, 1), 0.05), await aside(lambda: "done", 20))
asyncio.run(story())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "None done\n", "")
