"""Gathering from real processes, some of which do not answer."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mgpu_llm.adapters.engine import at_death, py_spy
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.engine.tree import read_stat
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.collector import AT_DEATH, CUT, Collector, Launched, sealed
from mgpu_llm.core.events import Stack, StacksTaken
from mgpu_llm.core.redaction import Redactor
from tests.core.test_incident import KEEP
from tests.support import fake_ras
from tests.support.engine_run import Run, running
from tests.support.toy_setup import free_port

FIVE = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        break
os.write(1, b"vLLM API server version 0.26.0\\n")
time.sleep(600)
"""


def collector(run: Run, folder: Path | None, find: Callable[[], Path | None] = py_spy.find) -> Collector:
    return Collector(
        engine=run.engine,
        gpus=Gpus(),
        incidents=Incidents(folder, keep=20, max_bytes=100 << 20),
        recording=lambda attempt: f"recording-of-{attempt}",
        model="/models/m",
        state_dir=str(folder),
        find_py_spy=find,
    )


async def five(run: Run, environment: dict[str, str] | None = None) -> None:
    await run.python(FIVE, env=environment)
    for _ in range(200):
        if len(run.lines) == 5 and len(run.engine.pids()) == 5:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"five processes never came: {run.lines}, {run.engine.pids()}")


def test_five_processes_are_all_looked_at(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run)
            assert await collector(run, tmp_path / "incidents").keep(KEEP, Launched())
            folder = tmp_path / "incidents" / KEEP.incident
            processes = json.loads((folder / "processes.json").read_text())
            assert {process["pid"] for process in processes} == set(run.engine.pids())
            stacks = (folder / "stacks.txt").read_text()
            assert stacks.count("\npid ") == 10
            assert stacks.count("<module> (<string>:") == 10
            document = json.loads((folder / "incident.json").read_text())
            assert document["versions"]["vllm"] == "0.26.0"
            assert document["recording"] == "recording-of-3"
            host = json.loads((folder / "host.json").read_text())
            assert host["meminfo"]["MemTotal"].endswith(" kB")
            assert host["disks"]["/models/m"]["free_bytes"] > 0
            assert host["shared_memory"]["total_bytes"] > 0

    asyncio.run(story())


def test_a_py_spy_that_hangs_costs_the_frames_and_nothing_else(tmp_path: Path) -> None:
    hanging = tmp_path / "py-spy"
    hanging.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(3600)\n")
    hanging.chmod(0o755)

    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run)
            assert await collector(run, tmp_path / "incidents", lambda: hanging).keep(KEEP, Launched())
            folder = tmp_path / "incidents" / KEEP.incident
            stacks = (folder / "stacks.txt").read_text()
            assert "it does not answer: it may be stuck in the driver" in stacks
            assert stacks.count("waits in") == 5
            assert len(json.loads((folder / "processes.json").read_text())) == 5
            # What was started to look is gone.
            listed = await asyncio.create_subprocess_exec("pgrep", "-f", str(hanging), stdout=asyncio.subprocess.PIPE)
            assert (await listed.communicate())[0] == b""

    asyncio.run(story())


def refused(folder: Path) -> Path:
    """A py-spy that may not look."""
    program = folder / "py-spy"
    program.write_text(
        "#!/bin/sh\necho 'Error: Permission Denied: Try running again with elevated permissions.' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    return program


def test_where_nobody_may_look_the_processes_tell_where_they_stood_as_they_die(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run, at_death.asked_for({}))
            pids = run.engine.pids()
            launched = Launched(environment=at_death.asked_for({}))
            assert await collector(run, tmp_path / "incidents", lambda: refused(tmp_path)).keep(KEEP, launched)
            folder = tmp_path / "incidents" / KEEP.incident
            told = (folder / AT_DEATH).read_text()
            assert {int(line.split()[2]) for line in told.splitlines() if line.startswith("# pid ")} == set(pids)
            assert told.count("Fatal Python error: Aborted") == 5
            assert told.count('File "<string>", line 7 in <module>') == 5
            # All the rest was gathered before.
            assert len(json.loads((folder / "processes.json").read_text())) == 5
            document = json.loads((folder / "incident.json").read_text())
            assert AT_DEATH not in document["not_observed"]
            assert document["gathered_in_s"] < 8
            assert len(run.lines) == 5

    asyncio.run(story())


@pytest.mark.parametrize("environment", [{}, {at_death.VARIABLE: ""}])
def test_an_engine_that_would_tell_nothing_is_not_ended_for_it(tmp_path: Path, environment: dict[str, str]) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run, environment)
            launched = Launched(environment=environment)
            assert await collector(run, tmp_path / "incidents", lambda: refused(tmp_path)).keep(KEEP, launched)
            document = json.loads((tmp_path / "incidents" / KEEP.incident / "incident.json").read_text())
            assert document["not_observed"][AT_DEATH] == "the engine runs without PYTHONFAULTHANDLER"
            assert len(run.engine.pids()) == 5

    asyncio.run(story())


@pytest.mark.parametrize("when", ["now", "before the verdict"])
def test_where_stacks_could_be_taken_nobody_is_asked_to_die(tmp_path: Path, when: str) -> None:
    frame = Stack(pid=1, thread=1, process="python", name="MainThread", state="S", frames=("wait (a.py:1)",))
    before = (StacksTaken(at=0.0, attempt=3, stacks=(frame,), unobserved=""),) if when != "now" else ()

    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run, at_death.asked_for({}))
            launched = Launched(environment=at_death.asked_for({}), looks=before)
            find = (lambda: refused(tmp_path)) if before else py_spy.find
            assert await collector(run, tmp_path / "incidents", find).keep(KEEP, launched)
            document = json.loads((tmp_path / "incidents" / KEEP.incident / "incident.json").read_text())
            assert AT_DEATH not in document["not_observed"]
            assert not (tmp_path / "incidents" / KEEP.incident / AT_DEATH).exists()
            assert [stat.state for pid in run.engine.pids() if (stat := read_stat(pid))] == ["S"] * 5

    asyncio.run(story())


def test_what_nccl_knows_is_kept(tmp_path: Path) -> None:
    port = free_port()

    async def story() -> None:
        async with running(tmp_path) as run:
            argv = (sys.executable, fake_ras.__file__, "127.0.0.1", str(port), "answers")
            await run.engine.spawn(1, argv, dict(os.environ))
            await run.line("ready")
            launched = Launched(environment={"NCCL_RAS_ADDR": f"localhost:{port}"})
            assert await collector(run, tmp_path / "incidents").keep(KEEP, launched)

    asyncio.run(story())
    assert (tmp_path / "incidents" / KEEP.incident / "nccl-ras.txt").read_text() == fake_ras.HEAD + fake_ras.REST


def test_one_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await five(run)
            gathering = asyncio.create_task(collector(run, tmp_path / "incidents").keep(KEEP, Launched()))
            await asyncio.sleep(0)
            gathering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gathering
            assert not (tmp_path / "incidents").exists()

    asyncio.run(story())


def test_without_an_engine_the_host_is_told_all_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        engine = EngineProcess(clock=asyncio.get_running_loop().time, emit=print, runtime_dir=tmp_path)
        incidents = Incidents(tmp_path / "incidents", keep=20, max_bytes=100 << 20)
        of_none = Collector(engine=engine, gpus=Gpus(), incidents=incidents, recording=str, model="m", state_dir="/")
        assert await of_none.keep(KEEP, Launched())
        document = incidents.document("last")
        assert document["not_observed"]["stacks.txt"] == "no process of the engine is left"
        assert "host.json" in document["files"]
        assert "engine.log" not in document["files"]

    asyncio.run(story())


def test_a_fault_in_one_source_is_named_and_costs_no_other(tmp_path: Path) -> None:
    def broken(_: int) -> str:
        raise ZeroDivisionError("in the recording's name")

    async def story() -> bool:
        engine = EngineProcess(clock=asyncio.get_running_loop().time, emit=print, runtime_dir=tmp_path)
        incidents = Incidents(tmp_path / "incidents", keep=20, max_bytes=100 << 20)
        faulty = Collector(engine=engine, gpus=Gpus(), incidents=incidents, recording=broken, model="m", state_dir="/")
        return await faulty.keep(KEEP, Launched())

    with capture_logs() as logs:
        assert not asyncio.run(story())
    assert [(told["event"], told["reason"]) for told in logs] == [
        ("incident.failed", "a fault of the collector: ZeroDivisionError: in the recording's name")
    ]


def test_an_incident_has_an_end_and_what_is_cut_is_the_beginning_at_a_lines_end() -> None:
    lines = "".join(f"line {number} with hf_plantedToken{number:08d}\n" for number in range(200_000))
    files = sealed(
        {"incident.json": {"a": 1}, "a.log": lines, "b.log": lines, "big.json": [lines], "c.log": "x"},
        Redactor(),
        3 << 20,
    )
    assert sum(map(len, files.values())) <= 3 << 20
    assert files["a.log"].decode().startswith(CUT)
    assert files["a.log"].decode().splitlines()[2].startswith("line ")
    assert files["a.log"].endswith(b"line 199999 with hf_...\n")
    assert json.loads(files["big.json"]) == {"unobserved": "it has no room in an incident"}
    assert b"planted" not in b"".join(files.values())
