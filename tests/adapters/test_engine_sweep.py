from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine.cgroup import remove_empty
from mgpu_llm.adapters.engine.ledger import Ledger
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


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2 as systemd delegates one to a unit."""
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (mount / "cgroup.controllers").exists() and os.access(mount, os.W_OK):
            path = mount / f"mgpu-llm-sweep-{os.getpid()}"
            path.mkdir()
            yield path
            remove_empty(path)
            path.rmdir()
            return
    pytest.skip("needs a cgroup of version 2 that this user may divide")


@contextmanager
def without_a_mark(cgroup: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a cgroup whose environment says nothing, in a session of its own."""
    cgroup.mkdir(parents=True, exist_ok=True)
    enter = ["/bin/sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec sleep 600', str(cgroup)]
    with subprocess.Popen(enter, env={}, start_new_session=True) as process:
        give_up_at = time.monotonic() + 20
        while str(process.pid) not in (cgroup / "cgroup.procs").read_text().split():
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        yield process
        process.kill()


def swept(runtime_dir: Path, cgroup: Path) -> list[str]:
    return asyncio.run(sweep_orphans(runtime_dir, clock=time.monotonic, deadline_s=20, cgroup=cgroup))


def test_what_sits_in_an_engine_s_cgroup_is_ended_whatever_became_of_its_environment(
    tmp_path: Path, cgroup: Path
) -> None:
    with (
        without_a_mark(cgroup / "engine-3") as one,
        without_a_mark(cgroup / "engine-4" / "below") as two,
        without_a_mark(cgroup / "helper") as other,
    ):
        told = swept(tmp_path, cgroup)
        assert sorted(told) == sorted(line for line in told if line.startswith("killed pid "))
        assert {int(line.split()[2]) for line in told} == {one.pid, two.pid}
        assert (one.wait(20), two.wait(20)) == (-9, -9)
        assert other.poll() is None
    assert [path.name for path in cgroup.iterdir() if path.is_dir()] == ["helper"]
    (cgroup / "helper").rmdir()


def test_in_a_cgroup_that_others_are_in_too_the_engines_may_be_theirs_and_stay(tmp_path: Path, cgroup: Path) -> None:
    with without_a_mark(cgroup) as other, without_a_mark(cgroup / "engine-1") as engine:
        assert swept(tmp_path, cgroup) == []
        assert (other.poll(), engine.poll()) == (None, None)


def test_shared_memory_of_an_engine_that_was_killed_together_with_its_daemon_is_removed(tmp_path: Path) -> None:
    name = f"psm_sweep_ledger{os.getpid()}"
    (tmp_path / "state").mkdir()
    ledger = Ledger(tmp_path / "state")
    ledger.begin()
    with (Path("/dev/shm") / name).open("wb"):
        ledger.look(ledger.new(), [os.getpid()])
    told = asyncio.run(sweep_orphans(tmp_path, clock=time.monotonic, deadline_s=20, ledger=Ledger(tmp_path / "state")))
    assert told == [f"removed '/dev/shm/{name}', which an engine of an earlier run left"]
    assert not Path("/dev/shm", name).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its root")
def test_an_engine_under_another_root_is_another_daemons_though_its_runtime_folder_has_the_same_name(
    tmp_path: Path,
) -> None:
    code = f"import os, time; os.chroot({str(tmp_path)!r}); print(flush=True); time.sleep(600)"
    env = {**os.environ, VARIABLE: f"{prefix(tmp_path)}1:aa"}
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE) as contained:
        try:
            assert contained.stdout is not None
            assert contained.stdout.readline() == b"\n"
            assert asyncio.run(sweep_orphans(tmp_path, clock=time.monotonic, deadline_s=10)) == []
            assert contained.poll() is None
        finally:
            contained.kill()
