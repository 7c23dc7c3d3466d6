"""Stacks that processes print as they die: each one's own, of none that is no Python's, and never with a core dump."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import at_death
from mgpu_llm.adapters.engine.tree import Stat, read_stat
from mgpu_llm.core.events import EngineExited, EngineGone, EngineSpawned
from tests.support.engine_run import Run, running, until

#: As vLLM's: a parent that ends all when one of its children ends, and children that end with their parent.
TREE = """
import os, signal, threading, time
def parent():
    while True:
        if os.waitpid(-1, os.WNOHANG)[0]:
            for pid in children: os.kill(pid, signal.SIGKILL)
            os.write(1, b"a child has died, and all with it\\n")
            os._exit(1)
        time.sleep(0.001)
def child():
    threading.Thread(target=nap, daemon=True).start()
    while os.getppid() == above: time.sleep(0.001)
    os._exit(1)
def nap(): time.sleep(3600)
above, children = os.getpid(), []
for _ in range(3):
    pid = os.fork()
    if pid == 0: child()
    children.append(pid)
os.write(1, b"up\\n")
parent()
"""
IGNORING = TREE.replace("def nap()", "signal.signal(signal.SIGABRT, signal.SIG_IGN)\ndef nap()", 1)
LIMIT_S = 10.0
WITH = {at_death.VARIABLE: "1"}


def told_of(words: tuple[str, ...]) -> dict[int, list[str]]:
    """What stands below each process's head, in the order of the heads."""
    found: dict[int, list[str]] = {}
    for word in words:
        if head := re.match(r"# pid (\d+) ", word):
            found[int(head[1])] = []
        else:
            found[next(reversed(found))].append(word)
    return found


async def tree(run: Run) -> None:
    await run.python(TREE, env=WITH)
    await run.line("up")
    await until("all four are there", lambda: len(run.engine.pids()) == 4)


def test_each_of_a_tree_tells_where_all_its_threads_stand_children_before_their_parent(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await tree(run)
            top, *children = sorted(run.engine.pids())
            words = told_of(await run.engine.abort(LIMIT_S))
            assert list(words) == [*children, top]
            for pid in children:
                assert words[pid][0] == "Fatal Python error: Aborted"
                assert sum("Thread 0x" in line or "thread 0x" in line for line in words[pid]) == 2
                assert any(re.search(r'File "<string>", line \d+ in nap', line) for line in words[pid])
                assert any(re.search(r'File "<string>", line \d+ in child', line) for line in words[pid])
            assert any(re.search(r'File "<string>", line \d+ in parent', line) for line in words[top])
            # Neither judged nor shown; and the parent had no time to do what it does when a child dies.
            assert run.lines == ["up"]
            assert run.engine.tail.last(10) == ("up",)
            assert (await run.first(EngineExited)).status == -6
            await run.engine.kill(LIMIT_S)
            await run.first(EngineGone)

    asyncio.run(story())


def test_of_one_whose_main_thread_waits_in_the_kernel_another_thread_prints_for_all(tmp_path: Path) -> None:
    source, library = tmp_path / "hang.c", tmp_path / "hang.so"
    # The parent of vfork waits as a thread in the driver does (state D), though it may be killed.
    source.write_text("#include <unistd.h>\nvoid hang(void) { if (vfork() == 0) for (;;) pause(); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O0", "-o", library, source], check=True)
    code = (
        "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        f"print('up', flush=True)\nctypes.CDLL({str(library)!r}).hang()"
    )
    words = list[str]()

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code, env=WITH)
            await run.line("up")
            top = (await run.first(EngineSpawned)).pid
            await until("it waits", lambda: (stat := read_stat(top)) is not None and stat.state == "D")
            stat = read_stat(top)
            assert stat is not None
            await at_death.abort([stat], LIMIT_S, words.append)
            await run.line('File "<string>", line 4 in <module>')
            await run.line("in _bootstrap")

    asyncio.run(story())
    assert [word.startswith("# pid ") for word in words] == [True]


def test_one_that_ignores_it_costs_its_share_of_the_time_and_is_left_to_the_kill(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(IGNORING, env=WITH)
            await run.line("up")
            begun = time.monotonic()
            words = told_of(await run.engine.abort(1.0))
            assert time.monotonic() - begun < 3
            first, *_ = words.values()
            assert first == ["# it has not ended"]
            assert run.engine.pids() != ()
            await run.engine.kill(LIMIT_S)
            await run.first(EngineGone)

    asyncio.run(story())


def test_whoever_does_not_want_to_wait_for_it_can_end_the_engine_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(IGNORING, env=WITH)
            await run.line("up")
            aborting = asyncio.create_task(run.engine.abort(60.0))
            await asyncio.sleep(0.2)
            aborting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await aborting
            await run.engine.kill(LIMIT_S)
            await run.first(EngineGone)
            await run.python("print('the next one')", attempt=2)
            await run.line("the next one")

    asyncio.run(story())


def test_an_engine_that_has_ended_is_not_asked_and_neither_is_none(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            assert await run.engine.abort(LIMIT_S) == ()
            await run.python("import os, time\nif os.fork() == 0: time.sleep(3600)\n", env=WITH)
            await run.first(EngineExited)
            (orphan,) = run.engine.pids()
            assert await run.engine.abort(LIMIT_S) == ()
            stat = read_stat(orphan)
            assert stat is not None
            assert stat.state == "S"

    asyncio.run(story())


def test_what_is_no_python_stands_still_and_gets_no_signal_that_would_end_it(tmp_path: Path) -> None:
    code = "import subprocess, time\nprint(subprocess.Popen(['sleep', '3600']).pid, flush=True)\ntime.sleep(3600)"

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code, env=WITH)
            await until("it names its child", lambda: bool(run.lines))
            child = int(run.lines[0])
            await until("the child is another program", lambda: Path(f"/proc/{child}/exe").readlink().name == "sleep")
            words = told_of(await run.engine.abort(LIMIT_S))
            assert child not in words
            assert len(words) == 1
            stat = read_stat(child)
            assert stat is not None
            assert stat.state == "T"

    asyncio.run(story())


@pytest.mark.parametrize("soft", ["hard", "0"])
def test_it_leaves_no_core_dump_whatever_the_limit_was(tmp_path: Path, soft: str) -> None:
    limited = (
        "import os, resource, time\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({soft}, hard))\n"
        f"os.chdir({str(tmp_path)!r})\nprint('up', flush=True)\ntime.sleep(3600)"
    )

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(limited, env=WITH)
            await run.line("up")
            assert "Fatal Python error: Aborted" in await run.engine.abort(LIMIT_S)
            await run.first(EngineExited)

    asyncio.run(story())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("core")]


def test_the_deepest_come_first_and_a_circle_has_an_end() -> None:
    def stat(pid: int, parent: int) -> Stat:
        found = read_stat(os.getpid())
        assert found is not None
        return Stat(**{**vars(found), "pid": pid, "parent": parent})

    members = [stat(10, 1), stat(11, 10), stat(12, 11), stat(13, 11), stat(14, 1)]
    assert [member.pid for member in at_death.deepest_first(members)] == [12, 13, 11, 10, 14]
    circle = [stat(10, 11), stat(11, 10)]
    assert len(at_death.deepest_first(circle)) == 2


def test_it_is_asked_for_unless_the_admin_has_said_otherwise() -> None:
    assert at_death.asked_for({"A": "b"}) == {"A": "b", "PYTHONFAULTHANDLER": "1"}
    for said in ("", "0", "1"):
        assert at_death.asked_for({"PYTHONFAULTHANDLER": said}) == {"PYTHONFAULTHANDLER": said}
    # What Python itself makes of it.
    for said in ("", "1"):
        asked = [sys.executable, "-c", "import faulthandler; print(faulthandler.is_enabled())"]
        done = subprocess.run(asked, env={"PYTHONFAULTHANDLER": said}, capture_output=True, text=True, check=True)
        assert done.stdout == f"{at_death.is_asked_for({'PYTHONFAULTHANDLER': said})}\n"
    assert not at_death.is_asked_for({})
