"""Gathering from real processes, some of which do not answer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mgpu_llm.adapters.engine import py_spy
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.collector import CUT, Collector, Launched, sealed
from mgpu_llm.core.redaction import Redactor
from tests.core.test_incident import KEEP
from tests.support.engine_run import Run, running

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


async def five(run: Run) -> None:
    await run.python(FIVE)
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
            assert stacks.count("waits in") == 10
            assert len(json.loads((folder / "processes.json").read_text())) == 5
            # What was started to look is gone.
            listed = await asyncio.create_subprocess_exec("pgrep", "-f", str(hanging), stdout=asyncio.subprocess.PIPE)
            assert (await listed.communicate())[0] == b""

    asyncio.run(story())


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
