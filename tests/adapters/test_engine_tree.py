"""Ending whole trees, by walking and by cgroup, with processes that try to get away."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine.cgroup import CgroupTree, find_delegated
from mgpu_llm.adapters.engine.tree import all_stats, read_stat
from mgpu_llm.core.events import EngineExited, EngineGone, EngineSpawned, EngineStuck
from tests.support.engine_run import running, until

#: A child, one in a session of its own, one that lost its parent, one that did both twice, and one that wiped its
#: environment; none minds SIGTERM. Each says its pid.
FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def stay(name):
    os.write(1, f"{name} is {os.getpid()}\\n".encode())
    while True: time.sleep(3600)
def child(*steps):
    if os.fork() == 0:
        for step in steps[:-1]:
            if step == "setsid":
                os.setsid()
            elif os.fork():
                os._exit(0)
        if steps[-1] == "bare":
            code = "import os, time; os.write(1, f'bare is {os.getpid()}\\\\n'.encode()); time.sleep(3600)"
            os.execve(sys.executable, [sys.executable, "-S", "-c", code], {})
        stay(steps[-1])
child("plain")
child("setsid", "session")
child("fork", "orphan")
child("setsid", "fork", "setsid", "fork", "daemon")
child("setsid", "bare")
stay("top")
"""
NAMES = {"plain", "session", "orphan", "daemon", "bare", "top"}


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2 that may be divided; the engine's goes into it."""
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        path = mount / f"mgpu-llm-test-{os.getpid()}"
        if (mount / "cgroup.controllers").exists() and os.access(mount, os.W_OK):
            path.mkdir()
            yield path
            path.rmdir()
            return
    pytest.skip("needs a cgroup of version 2 that this user may divide")


def family(lines: list[str]) -> dict[str, int]:
    return {name: int(pid) for name, _, pid in (line.split() for line in lines)}


def is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.alive


async def end_a_family(tmp_path: Path, cgroup: Path | None) -> None:
    sleep = "import time; time.sleep(600)"
    async with running(tmp_path, cgroup) as run:
        bystander = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", sleep, start_new_session=True)
        try:
            await run.python(FAMILY)
            await until("the family is complete", lambda: set(family(run.lines)) == NAMES)
            pids = family(run.lines)
            assert (await run.first(EngineSpawned)).pid == pids["top"]
            await run.engine.kill(20)
            assert not [name for name, pid in pids.items() if is_alive(pid)]
            assert run.all(EngineExited)[0].status == -signal.SIGKILL
            assert run.all(EngineGone)[0].remarks == ()
            assert not [pid for pid in pids.values() if read_stat(pid) is not None and _parent(pid) == os.getpid()]
            assert bystander.returncode is None
        finally:
            bystander.kill()
            assert await bystander.wait() == -signal.SIGKILL


def _parent(pid: int) -> int:
    stat = read_stat(pid)
    return 0 if stat is None else stat.parent


def test_by_walking_nobody_escapes_no_zombie_stays_and_a_bystander_lives(tmp_path: Path) -> None:
    asyncio.run(end_a_family(tmp_path, None))


def test_by_cgroup_nobody_escapes_and_the_cgroup_is_removed(tmp_path: Path, cgroup: Path) -> None:
    asyncio.run(end_a_family(tmp_path, cgroup))
    assert not list(cgroup.glob("engine-*"))


def test_where_the_kernel_has_no_cgroup_kill_each_process_is_killed(cgroup: Path) -> None:
    class WithoutKill(CgroupTree):
        """As on Linux before 5.14."""

        def kill_at_once(self) -> bool:
            return False

    tree = WithoutKill(cgroup, 1)
    sleeper = (sys.executable, "-S", "-c", "import os, time; os.fork(); time.sleep(600)")
    with subprocess.Popen(tree.enter(sleeper)) as child:
        deadline = time.monotonic() + 20
        while len(tree.members()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {stat.pid for stat in tree.kill()} >= {child.pid}
        while tree.kill() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tree.members() == ()
    assert tree.remove() == ""


def test_the_engine_is_in_its_cgroup_from_the_first_instruction_with_the_pid_that_was_told(
    tmp_path: Path, cgroup: Path
) -> None:
    async def story() -> None:
        async with running(tmp_path, cgroup) as run:
            await run.python("import os; print(os.getpid()); print(open('/proc/self/cgroup').read())", attempt=2)
            await run.first(EngineExited)
            assert run.lines[0] == str((await run.first(EngineSpawned)).pid)
            assert any(line.startswith("0::") and line.endswith("/engine-2") for line in run.lines)

    asyncio.run(story())


def test_in_a_cgroup_that_may_not_be_divided_the_tree_is_walked(tmp_path: Path) -> None:
    asyncio.run(end_a_family(tmp_path, tmp_path / "no-cgroup"))


def test_orphans_of_a_dead_top_process_are_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(FAMILY)
            await until("the family is complete", lambda: set(family(run.lines)) == NAMES)
            pids = family(run.lines)
            os.kill(pids["top"], signal.SIGKILL)
            await run.first(EngineExited)
            assert is_alive(pids["plain"])
            await run.engine.kill(20)
            assert not [name for name, pid in pids.items() if is_alive(pid)]

    asyncio.run(story())


#: Orphans that end by themselves while the engine goes on.
SHORT_LIVED = """
import os, time
os.write(1, b"up\\n")
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
        os._exit(0)
    os.wait()
os.write(1, b"all are orphans\\n")
time.sleep(600)
"""


def test_orphans_that_end_while_the_engine_serves_do_not_stay_as_zombies(tmp_path: Path) -> None:
    def zombies(session: int) -> int:
        return sum(stat.session == session and not stat.alive for stat in all_stats().values())

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(SHORT_LIVED)
            await run.line("all are orphans")
            top = (await run.first(EngineSpawned)).pid
            await until("the last of them has ended", lambda: zombies(top) == 20)
            assert [process.pid for process in run.engine.sample()] == [top]
            assert zombies(top) == 0

    asyncio.run(story())


#: One process at a time that forks and ends every few milliseconds, and of itself after 1000 generations.
CHAIN = """
import os, time
if os.fork() == 0:
    for generation in range(1000):
        if {setsid}: os.setsid()
        if os.fork(): os._exit(0)
        if generation == 3: os.write(1, b"chain is running\\n")
        time.sleep(0.005)
time.sleep(600)
"""


async def end_a_chain(tmp_path: Path, cgroup: Path | None) -> None:
    async with running(tmp_path, cgroup) as run:
        await run.python(CHAIN.format(setsid=cgroup is not None))
        await run.line("chain is running")
        await run.engine.kill(20)
        assert run.all(EngineGone)
        assert run.engine.pids() == ()


def test_a_chain_of_forks_in_the_engine_s_group_does_not_outrun_the_kill(tmp_path: Path) -> None:
    asyncio.run(end_a_chain(tmp_path, None))


def test_a_chain_of_forks_in_ever_new_sessions_does_not_outrun_the_kill_of_its_cgroup(
    tmp_path: Path, cgroup: Path
) -> None:
    asyncio.run(end_a_chain(tmp_path, cgroup))


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.mark.skipif(not os.access(FREEZER, os.W_OK), reason="needs the freezer of cgroup version 1")
def test_a_process_that_outlives_sigkill_is_named_and_can_be_ended_later(tmp_path: Path) -> None:
    async def story() -> None:
        freezer = FREEZER / f"mgpu-llm-test-{os.getpid()}"
        freezer.mkdir()
        try:
            async with running(tmp_path) as run:
                await run.python("import time; print('up', flush=True); time.sleep(600)")
                await run.line("up")
                pid = (await run.first(EngineSpawned)).pid
                (freezer / "cgroup.procs").write_text(str(pid))
                (freezer / "freezer.state").write_text("FROZEN")
                await run.engine.kill(0.5)
                (stuck,) = run.all(EngineStuck)
                assert len(stuck.holders) == 1
                assert stuck.holders[0].startswith(f"pid {pid} (python")
                assert stuck.holders[0].endswith("state D)")
                assert not run.all(EngineGone)
                (freezer / "freezer.state").write_text("THAWED")
                await run.engine.kill(20)
                assert run.all(EngineGone)
        finally:
            await until("the freezer is empty", lambda: not (freezer / "cgroup.procs").read_text())
            freezer.rmdir()

    asyncio.run(story())


def test_a_delegated_cgroup_is_found_only_under_systemd(cgroup: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mgpu_llm.adapters.engine.cgroup import find_delegated;"
        "Path(sys.argv[1], 'cgroup.procs').write_text('0'); print(find_delegated({'INVOCATION_ID': 'x'}))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(cgroup)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(cgroup), done.stderr
    assert find_delegated({}) is None
