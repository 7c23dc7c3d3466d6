"""One process from close by, and what of it an incident tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mgpu_llm.adapters.engine.close_up import close_up, command_line
from mgpu_llm.adapters.engine.output import Tail

HOLDING = """
import mmap, os, socket, sys, time
folder = sys.argv[1]
held = [open(f"{folder}/{name}") for name in ("model-1.safetensors", "inside", "a.lock")]
held += [open("/dev/shm/psm_close_up_%d" % os.getpid(), "w"), socket.socket(), os.pipe()]
os.unlink("/dev/shm/psm_close_up_%d" % os.getpid())
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_is_told_with_its_state_its_limits_and_what_it_holds_open(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "inside", "a.lock"):
        (tmp_path / name).touch()
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        try:
            seen = close_up(popen.pid, str(tmp_path))
            elsewhere = close_up(popen.pid, "org/name")
            assert command_line(popen.pid) == command
        finally:
            popen.kill()
    assert seen["pid"] == popen.pid
    assert seen["status"]["VmRSS"].endswith(" kB")
    assert seen["status"]["PPid"].isdecimal()
    assert not [key for key in seen["status"] if key.startswith(("Sig", "Cap"))]
    assert seen["io"]["rchar"] > 0
    assert any(line.startswith("Max open files ") for line in seen["limits"])
    assert {"socket", "pipe", "file", "shared memory"} <= set(seen["open"]["kinds"])
    files = seen["open"]["files"]
    assert {str(tmp_path / name) for name in ("model-1.safetensors", "inside", "a.lock")} <= set(files)
    assert f"/dev/shm/psm_close_up_{popen.pid} (deleted)" in files
    assert str(tmp_path / "inside") not in elsewhere["open"]["files"]


def test_one_that_has_ended_is_nothing() -> None:
    popen = subprocess.Popen(["true"])
    popen.wait()
    assert close_up(popen.pid) == {}
    assert command_line(popen.pid) == []


def test_the_last_lines_of_this_engine_are_not_those_of_the_one_before() -> None:
    tail = Tail(max_lines=5)
    for number in range(3):
        tail.append(f"old {number}")
    tail.begin_anew()
    assert tail.last_of_this(10) == ()
    tail.append("new 0")
    tail.append("new 1")
    assert tail.last_of_this(10) == ("new 0", "new 1")
    assert tail.last_of_this(1) == ("new 1",)
    assert tail.last(3) == ("old 2", "new 0", "new 1")
    for number in range(9):
        tail.append(f"more {number}")
    assert tail.last_of_this(10) == tuple(f"more {number}" for number in range(4, 9))
