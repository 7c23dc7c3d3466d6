from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from mgpu_llm.adapters.engine.sweep import sweep_orphans
from mgpu_llm.adapters.engine.tags import VARIABLE, prefix
from mgpu_llm.adapters.engine.tree import read_stat
from tests.support.engine_run import until

#: A daemon that spawns an engine of two processes, tells their pids and dies without a word. The child has wiped its
#: environment in memory as setproctitle does, so that only its session tells whose it is.
DAEMON = """
import asyncio, os, sys, time
from pathlib import Path
from mgpu_llm.adapters.engine.process import EngineProcess
ENGINE = '''
import os, subprocess, sys, time
fd = os.open("/dev/shm/psm_sweep%d" % os.getpid(), os.O_CREAT | os.O_RDWR)
code = "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", code], env={})
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
'''
async def main():
    lines = []
    def emit(event):
        if hasattr(event, "text"):
            print(event.text, flush=True)
            os._exit(0)
    engine = EngineProcess(clock=time.monotonic, emit=emit, runtime_dir=Path(sys.argv[1]))
    await engine.spawn(1, (sys.executable, "-S", "-c", ENGINE), os.environ)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def abandoned_engine(runtime_dir: Path) -> list[int]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", DAEMON, str(runtime_dir)], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.stdout, done.stderr
    return [int(pid) for pid in done.stdout.split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if (stat := read_stat(pid)) is not None and stat.alive]


def memory(engine: list[int]) -> Path:
    return Path(f"/dev/shm/psm_sweep{engine[0]}")


def sockets(runtime_dir: Path) -> list[Path]:
    return [*runtime_dir.glob("zmq-*"), *Path("/tmp").glob(f"mgpu-llm-{prefix(runtime_dir)[:-1]}-*")]


def test_engines_of_an_earlier_life_of_this_daemon_are_ended_and_told_and_no_others(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    others.mkdir()
    mine, theirs = abandoned_engine(ours), abandoned_engine(others)
    assert alive(mine) == mine
    assert memory(mine).exists()
    assert sockets(ours)

    async def story() -> None:
        told = await sweep_orphans(ours, clock=time.monotonic, deadline_s=20)
        assert len(told) == 2
        for pid in mine:
            assert any(f"killed pid {pid} (python" in line for line in told)
        assert alive(mine) == []
        assert not memory(mine).exists()
        assert not sockets(ours)
        assert sockets(others)
        assert alive(theirs) == theirs
        assert await sweep_orphans(ours, clock=time.monotonic, deadline_s=20) == []
        await sweep_orphans(others, clock=time.monotonic, deadline_s=20)
        await until("the others are gone too", lambda: alive(theirs) == [])
        assert not sockets(others)

    asyncio.run(story())


#: Begun with the mark of an engine, as its parent was: by somebody who copied an engine's environment, say.
MARKED = """
import asyncio, subprocess, sys, time
from pathlib import Path
from mgpu_llm.adapters.engine.sweep import sweep_orphans
if sys.argv[2:]:
    raise SystemExit(subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]]).returncode)
print(asyncio.run(sweep_orphans(Path(sys.argv[1]), clock=time.monotonic, deadline_s=20)))
"""


def test_a_daemon_begun_from_an_engine_s_environment_ends_neither_itself_nor_its_parent(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, VARIABLE: prefix(tmp_path) + "1:abc"}
    command = [sys.executable, "-c", MARKED, str(tmp_path), MARKED]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, start_new_session=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
