"""A py-spy that is missing, fails, hangs, or is cancelled: a program of that name in its place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import py_spy, stacks
from mgpu_llm.adapters.engine.tree import all_stats, read_stat
from mgpu_llm.core.events import Stack
from tests.support.engine_run import until
from tests.support.stack_targets import SLEEPING, running_python, sleeping_program, spies, stand_in, wait_until

#: What py-spy says of one thread, for programs in its place, and what it says otherwise.
ANSWERS = """
import json
def frame(**other): return {"name": "rest", "filename": "/a/b.py", "line": 7, **other}
def thread(**other):
    said = {"thread_name": "MainThread", "thread_id": 1, "os_thread_id": pid, "active": False, "frames": [frame()], **other}
    return json.dumps([said])
"""
#: Takes stacks as a daemon does.
TAKER = """
import asyncio, sys
from pathlib import Path
from mgpu_llm.adapters.engine import stacks
asyncio.run(stacks.take([int(sys.argv[1])], 600, find=lambda: Path(sys.argv[2])))
"""


def take_by(program: Path | None, *pids: int, deadline_s: float = 30.0) -> tuple[tuple[Stack, ...], str]:
    return asyncio.run(stacks.take(pids, deadline_s, find=lambda: program))


def test_without_py_spy_the_kernel_s_view_is_left_and_the_reason_says_what_to_install(tmp_path: Path) -> None:
    with running_python(tmp_path, SLEEPING) as pid, sleeping_program() as other:
        seen, unobserved = take_by(None, pid, other)
    assert [(stack.pid, stack.frames) for stack in seen] == [(pid, ()), (other, ())]
    assert unobserved.startswith(f"cannot read the Python frames of pid {pid} (python")
    assert unobserved.endswith("): py-spy is missing; install it beside the daemon: pip install py-spy")


def test_py_spy_is_found_in_this_environment_first_then_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert py_spy.find() == Path(sysconfig.get_path("scripts"), "py-spy")
    monkeypatch.setattr(sysconfig, "get_path", {"scripts": str(tmp_path / "none")}.get)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert py_spy.find() is None
    on_path = stand_in(tmp_path, "")
    assert py_spy.find() == on_path


def test_one_that_ends_while_it_is_looked_at_is_left_out_silently(tmp_path: Path) -> None:
    killer = stand_in(tmp_path, "os.kill(pid, 9); sys.exit('Error: Failed to open process')")
    with running_python(tmp_path, SLEEPING) as pid:
        assert take_by(killer, pid) == ((), "")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "sys.exit('Error: Failed to get stack traces\\n\\nCaused by:\\n    0: Unsupported version of Python: 3.99.0\\n')",
            "py-spy says: Failed to get stack traces, Unsupported version of Python: 3.99.0",
        ),
        (
            "sys.exit('Error: Failed to find python version from target process\\n\\nStack backtrace:\\n   0: main')",
            "py-spy says: Failed to find python version from target process",
        ),
        ("print('[{}]')", "py-spy answers in other words than version 0.4 (KeyError)"),
        ("print('nonsense')", "py-spy answers in other words than version 0.4 (JSONDecodeError)"),
        ("print('5')", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print('{\"a\": 1}')", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print('[' * 100000)", "py-spy answers in other words than version 0.4 (RecursionError)"),
        ("print('1' * 5000)", "py-spy answers in other words than version 0.4 (ValueError)"),
        ("print(thread(thread_name=['x']))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(os_thread_id='x'))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(os_thread_id=10**30))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(frames={'a': 1}))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(frames=[frame(name=None)]))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(frames=[frame(filename=5)]))", "py-spy answers in other words than version 0.4 (TypeError)"),
        ("print(thread(frames=[frame(line='x')]))", "py-spy answers in other words than version 0.4 (ValueError)"),
        ("os.write(1, b'[' + b'0,' * (5 << 20))", "py-spy says more than 8 MiB"),
        ("os.write(2, b'no' * (5 << 20)); time.sleep(3600)", "py-spy says more than 8 MiB"),
        ("os.kill(os.getpid(), 15)", "py-spy was ended by signal 15"),
    ],
)
def test_what_py_spy_cannot_do_is_told_in_one_line(tmp_path: Path, code: str, reason: str) -> None:
    program = stand_in(tmp_path, ANSWERS + code)
    with running_python(tmp_path, SLEEPING) as pid:
        (stack,), unobserved = take_by(program, pid)
    assert stack.frames == ()
    assert unobserved == f"cannot read the Python frames of pid {pid} ({stack.process}): {reason}"


def test_a_py_spy_that_cannot_be_run_is_told(tmp_path: Path) -> None:
    program = stand_in(tmp_path, "")
    program.write_bytes(b"\x7fELF")
    with running_python(tmp_path, SLEEPING) as pid:
        _, unobserved = take_by(program, pid)
    assert unobserved.endswith(f"): cannot run '{program}': Exec format error")


def test_what_py_spy_says_of_a_thread_is_understood_and_half_a_character_can_be_printed(tmp_path: Path) -> None:
    program = stand_in(tmp_path, ANSWERS + "print(thread(frames=[frame(), frame(name='\\ud800<module>')]))")
    with running_python(tmp_path, SLEEPING) as pid:
        (stack,), unobserved = take_by(program, pid)
    assert (stack.frames, unobserved) == (("rest (/a/b.py:7)", "?<module> (/a/b.py:7)"), "")


def test_a_py_spy_dies_with_the_daemon_that_began_it(tmp_path: Path) -> None:
    hanging = stand_in(tmp_path, f"open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(3600)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        running_python(tmp_path, SLEEPING) as pid,
        subprocess.Popen([sys.executable, "-c", TAKER, str(pid), hanging], env=env) as daemon,
    ):
        wait_until("it hangs", (tmp_path / "up").exists)
        (spy,) = [stat.pid for stat in all_stats().values() if stat.parent == daemon.pid]
        daemon.kill()
        daemon.wait()
        wait_until("it has ended", lambda: (stat := read_stat(spy)) is None or not stat.alive)
        with contextlib.suppress(
            ChildProcessError
        ):  # it is ours where an earlier test has made us the parent of orphans
            os.waitpid(spy, 0)


def test_one_trouble_of_many_processes_is_told_once(tmp_path: Path) -> None:
    with running_python(tmp_path, SLEEPING) as pid:
        _, unobserved = take_by(None, *[pid] * 5)
    assert unobserved.count("py-spy is missing") == 1
    assert " and 2 more: " in unobserved


def test_a_py_spy_that_does_not_answer_is_ended_at_the_deadline(tmp_path: Path) -> None:
    hanging = stand_in(tmp_path, "time.sleep(3600)")
    with running_python(tmp_path, SLEEPING) as pid:
        (stack,), unobserved = take_by(hanging, pid, deadline_s=2.0)
    assert (stack.pid, stack.frames) == (pid, ())
    assert unobserved.endswith("): it does not answer: it may be stuck in the driver")
    assert spies() == []


def test_processes_that_do_not_answer_do_not_keep_the_others_from_being_looked_at(tmp_path: Path) -> None:
    real = str(py_spy.find())
    with running_python(tmp_path, SLEEPING) as stuck, running_python(tmp_path, SLEEPING) as well:
        hang_or_look = f"time.sleep(3600) if pid == {stuck} else os.execv({real!r}, ['py-spy', *sys.argv[1:]])"
        seen, unobserved = take_by(stand_in(tmp_path, hang_or_look), *[stuck] * 2, well, deadline_s=4.0)
    assert [(stack.pid, bool(stack.frames)) for stack in seen] == [(stuck, False)] * 2 + [(well, True)] * 2
    assert f"pid {well} " not in unobserved
    assert spies() == []


def test_when_a_take_is_cancelled_no_py_spy_is_left(tmp_path: Path) -> None:
    hanging = stand_in(tmp_path, "time.sleep(3600)")

    async def story(pid: int) -> None:
        taking = asyncio.create_task(stacks.take([pid] * 8, find=lambda: hanging))
        await until("two hang, and the loop goes on", lambda: len(spies()) >= 2)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert spies() == []

    with running_python(tmp_path, SLEEPING) as pid:
        asyncio.run(story(pid))
