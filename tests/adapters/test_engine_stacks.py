"""Stacks of real processes: asleep, busy, stuck, stopped, ended, not Python's, not ours to look into."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import py_spy, stacks
from mgpu_llm.core.events import Stack
from tests.support.stack_targets import BUSY, POLLING, SLEEPING, STUCK, running_python, sleeping_program, wait_until

#: Takes stacks of the processes in its arguments, after it has given up what the first one names, and prints them.
TAKER = """
import asyncio, ctypes, dataclasses, json, os, sys
from pathlib import Path
from mgpu_llm.adapters.engine import stacks
what, program, pids = sys.argv[1], Path(sys.argv[2]), [int(pid) for pid in sys.argv[3:]]
if what == "ptrace":
    assert ctypes.CDLL(None).prctl(24, 19, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_SYS_PTRACE: py-spy begins without it
else:
    os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
seen, unobserved = asyncio.run(stacks.take(pids, find=lambda: program))
print(json.dumps([[dataclasses.asdict(stack) for stack in seen], unobserved]))
"""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give rights up")


def take(*pids: int) -> tuple[tuple[Stack, ...], str]:
    return asyncio.run(stacks.take(pids))


def states(pid: int) -> set[str]:
    return {stack.state for stack in take(pid)[0]}


def test_of_a_sleeping_process_two_takes_are_equal_and_name_its_functions_innermost_first(tmp_path: Path) -> None:
    with running_python(tmp_path, SLEEPING) as pid:
        wait_until("both threads sleep", lambda: [bool(stack.waits_in) for stack in take(pid)[0]] == [True, True])
        first = take(pid)
        assert first == take(pid)
    (main, napper), unobserved = first
    assert unobserved == ""
    assert main.frames == ("rest (model/weights/load.py:3)", "<module> (model/weights/load.py:7)")
    assert (main.pid, main.thread, main.name, main.state) == (pid, pid, "MainThread", "S")
    assert main.process.startswith("python")
    assert napper.frames[0] == "nap (model/weights/load.py:4)"
    assert (napper.pid, napper.name, napper.state) == (pid, "Napper", "S")
    assert napper.thread != pid


def test_of_a_busy_process_two_takes_differ(tmp_path: Path) -> None:
    with running_python(tmp_path, BUSY) as pid:
        seen = {take(pid)[0][0].frames for _ in range(20)}
    assert len(seen) > 1
    assert any("work (model/weights/load.py:6)" in frames for frames in seen)


def test_a_process_that_spins_in_c_and_keeps_the_interpreter_s_lock_is_seen_to_stand_still(tmp_path: Path) -> None:
    with running_python(tmp_path, STUCK) as pid:
        wait_until("it spins", lambda: take(pid)[0][0].frames[:1] == ("spin (model/weights/load.py:9)",))
        seen, again = take(pid), take(pid)
    assert [stack.frames for stack in seen[0]] == [stack.frames for stack in again[0]]
    assert (seen[0][0].state, seen[0][0].waits_in, seen[1]) == ("R", "", "")
    assert seen[0][1].name == "Napper"


def test_a_loop_that_polls_is_read_with_all_its_outer_frames(tmp_path: Path) -> None:
    with running_python(tmp_path, POLLING) as pid:
        takes = [take(pid)[0][0].frames[-2:] for _ in range(10)]
    # One of a hundred may still be torn: ten tries, each with a chance of six in ten to be so.
    assert takes.count(("dequeue (model/weights/load.py:10)", "<module> (model/weights/load.py:12)")) >= 8


def test_a_process_without_python_has_the_kernel_s_view_alone_and_is_no_reason() -> None:
    with sleeping_program() as pid:
        (stack,), unobserved = take(pid)
    assert unobserved == ""
    assert (stack.pid, stack.thread, stack.process, stack.state) == (pid, pid, "sleep", "S")
    assert (stack.name, stack.frames, bool(stack.waits_in)) == ("", (), True)


def test_a_stopped_process_is_read_all_the_same_and_is_not_woken(tmp_path: Path) -> None:
    with running_python(tmp_path, SLEEPING) as pid:
        wait_until("it sleeps", lambda: states(pid) == {"S"})
        moving, _ = take(pid)
        os.kill(pid, signal.SIGSTOP)
        wait_until("it is stopped", lambda: states(pid) == {"T"})
        stopped, unobserved = take(pid)
        assert states(pid) == {"T"}
    assert unobserved == ""
    assert [stack.frames for stack in stopped] == [stack.frames for stack in moving]


def test_what_has_ended_is_left_out_and_the_others_stand_in_the_order_asked_for(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    assert gone.wait() == 0
    with (
        subprocess.Popen(["true"]) as zombie,
        running_python(tmp_path, SLEEPING) as one,
        running_python(tmp_path, SLEEPING) as other,
    ):
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        seen, unobserved = take(other, gone.pid, zombie.pid, one)
    assert unobserved == ""
    assert list(dict.fromkeys(stack.pid for stack in seen)) == [other, one]
    assert take() == ((), "")


def taken_without(what: str, *pids: int) -> tuple[list[dict[str, object]], str]:
    """As a process that has given up the right to look into others ("ptrace"), or as nobody ("root")."""
    found = py_spy.find()
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = shutil.copy2(found, folder)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        argv = [sys.executable, "-c", TAKER, what, program, *(str(pid) for pid in pids)]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    seen, unobserved = json.loads(done.stdout)
    return seen, unobserved


@only_root
def test_where_ptrace_is_not_allowed_the_python_processes_are_named_with_the_fix(tmp_path: Path) -> None:
    with running_python(tmp_path, SLEEPING) as pid, sleeping_program() as other:
        wait_until("it sleeps", lambda: states(pid) == {"S"})
        seen, unobserved = taken_without("ptrace", pid, other)
    assert [(stack["pid"], stack["frames"], stack["state"]) for stack in seen] == [(pid, [], "S"), (other, [], "S")]
    assert f"pid {pid} (python" in unobserved
    assert f"pid {other} " not in unobserved
    assert "CAP_SYS_PTRACE" in unobserved


@only_root
def test_a_process_of_another_user_and_one_that_is_not_dumpable_are_told_apart(tmp_path: Path) -> None:
    # Whoever changes user is not dumpable from then on.
    changed = SLEEPING.replace("time\n", "time, os; os.setresuid(65534, 65534, 65534)\n", 1)
    with running_python(tmp_path, SLEEPING) as root, running_python(tmp_path, changed) as nobody:
        seen, unobserved = taken_without("root", root, nobody)
    assert [(stack["pid"], stack["frames"]) for stack in seen] == [(root, []), (nobody, [])]
    first, second = unobserved.split("; cannot ")
    assert f"pid {root} (python" in first
    assert first.endswith(": it runs as uid 0, the daemon as uid 65534; run both as one user")
    assert f"pid {nobody} (python" in second
    assert ": it has made itself not dumpable; give the daemon CAP_SYS_PTRACE" in second


def test_why_ptrace_is_denied_names_yama_only_where_it_may_be_the_cause() -> None:
    def why(us: int = 7, owner: int = 7, dumpable: bool = True, scope: int = 1) -> str:
        return stacks.why_denied(us=us, owner=owner, dumpable=dumpable, scope=scope)

    assert why().startswith(
        "kernel.yama.ptrace_scope=1 lets nobody look into the engine's processes; set it to 0 (sysctl)"
    )
    assert why(scope=2).startswith("kernel.yama.ptrace_scope=2 lets nobody look into the engine's processes;")
    assert why(scope=3).endswith("boot with 0")
    assert why(scope=0).startswith("ptrace is not allowed; give the daemon CAP_SYS_PTRACE")
    assert why(owner=8).startswith("it runs as uid 8, the daemon as uid 7;")
    assert why(us=0).startswith("kernel.yama.ptrace_scope=1")
    assert why(dumpable=False).startswith("it has made itself not dumpable;")
