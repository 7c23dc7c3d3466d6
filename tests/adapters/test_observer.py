"""What is told of an engine that is watched: by a real observer of real processes, the host and a simulated driver."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import pressure
from mgpu_llm.adapters.engine.pressure import Pressure
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.core.events import Event, HostSampled, ProcessesSampled, ProcessSample
from mgpu_llm.observer import Observer
from tests.support.engine_run import running, until
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid


async def watched(folder: Path, ask: Callable[[], Pressure] | None, *, loading: bool) -> list[Event]:
    """What is told of a process until its second sample has come."""
    told = list[Event]()
    observer = Observer(Gpus(), {}, time.monotonic, told.append)
    async with running(folder) as run:
        await run.python("import time; time.sleep(600)")
        watching = asyncio.create_task(observer.watch(1, (), run.engine.sample, lambda: loading, ask))
        await until("samples come", lambda: sum(isinstance(event, ProcessesSampled) for event in told) >= 2)
        watching.cancel()
    return told


def test_while_an_engine_loads_the_pressure_on_the_host_is_told_beside_its_processes(tmp_path: Path) -> None:
    told = asyncio.run(watched(tmp_path, lambda: Pressure(1.5, None), loading=True))
    (host,) = (event for event in told if isinstance(event, HostSampled))
    assert (host.attempt, host.memory_percent, host.storage_percent) == (1, 1.5, None)


def test_while_an_engine_serves_and_where_nobody_asks_pressure_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu_llm.observer.SERVING_EVERY_S", 0.05)
    told = asyncio.run(watched(tmp_path, lambda: Pressure(1.5, None), loading=False))
    told += asyncio.run(watched(tmp_path, None, loading=True))
    assert not any(isinstance(event, HostSampled) for event in told)


def test_pressure_is_read_of_the_engine_s_cgroup_where_that_tells_and_else_of_the_host(tmp_path: Path) -> None:
    full = "some avg10=9.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={} avg60=0.00 avg300=0.00 total=0\n"
    host, cgroup = tmp_path / "pressure", tmp_path / "engine-1"
    host.mkdir()
    cgroup.mkdir()
    assert pressure.read(cgroup, host) == pressure.read(None, host) == Pressure(None, None)
    (host / "memory").write_text(full.format("1.25"))
    (host / "io").write_text("some avg10=9.00 avg60=0.00 avg300=0.00 total=1\n")
    assert pressure.read(cgroup, host) == Pressure(1.25, None)
    (cgroup / "memory.pressure").write_text(full.format("0.00"))
    (cgroup / "io.pressure").write_text(full.format("99.90"))
    assert pressure.read(cgroup, host) == Pressure(0.0, 99.9)
    assert pressure.read(None, host) == Pressure(1.25, None)


@pytest.mark.skipif(not os.access("/proc/pressure/memory", os.R_OK), reason="needs a kernel with PSI")
def test_this_host_tells_its_pressure(tmp_path: Path) -> None:
    async def story() -> Pressure:
        async with running(tmp_path) as run:
            return run.engine.pressure()

    memory, storage = asyncio.run(story())
    assert memory is not None
    assert storage is not None
    assert 0 <= memory <= 100
    assert 0 <= storage <= 100


WATCH_ONE = """
import asyncio, json, sys, time
from dataclasses import asdict
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.observer import Observer
from tests.support.fake_nvml.asked import uuid
async def first(loading):
    told = asyncio.Queue()
    observer = Observer(Gpus(), {"0": uuid(0)}, time.monotonic, told.put_nowait)
    watching = asyncio.create_task(observer.watch(1, ("0",), lambda: (), lambda: loading))
    while not hasattr(event := await told.get(), "gpus"): pass
    watching.cancel()
    return asdict(event.gpus[0])
print(json.dumps([asyncio.run(first(loading)) for loading in (True, False)]))
"""


def test_a_gpu_is_told_with_its_size_and_who_computes_on_it_but_that_only_while_loading(
    tmp_path: Path, library: Path
) -> None:
    nvml = FakeNvml(tmp_path, library)
    nvml.set([FakeGpu(total_bytes=9, used_bytes=7, utilisation_percent=5, power_mw=6, processes=((12, 3), (13, None)))])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **nvml.environment()}
    done = subprocess.run([sys.executable, "-c", WATCH_ONE], env=env, capture_output=True, text=True)
    loading, serving = json.loads(done.stdout or done.stderr)
    assert loading == {
        "uuid": uuid(0),
        "used_bytes": 7,
        "total_bytes": 9,
        "utilisation_percent": 5,
        "power_mw": 6,
        "processes": [[12, 3], [13, None]],
    }
    assert serving == {**loading, "processes": None}


def test_a_kernel_that_does_not_answer_is_told_of_and_holds_up_neither_the_others_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mgpu_llm.observer.LOOK_WITHIN_S", 0.2)
    stuck, answer = os.pipe()
    told = list[Event]()

    def sample() -> tuple[ProcessSample, ...]:
        os.read(stuck, 1)
        return ()

    async def story() -> None:
        observer = Observer(Gpus(), {}, time.monotonic, told.append)
        watching = asyncio.create_task(observer.watch(1, (), sample, lambda: True, lambda: Pressure(1.5, None)))
        await until("the host is told", lambda: any(isinstance(event, HostSampled) for event in told))
        await asyncio.sleep(1.0)
        assert not any(isinstance(event, ProcessesSampled) for event in told)
        os.write(answer, b"x")
        await until("it answers after all", lambda: any(isinstance(event, ProcessesSampled) for event in told))
        await asyncio.sleep(1.0)
        watching.cancel()

    asyncio.run(story())  # ends although the second look never comes back
    assert capsys.readouterr().out.count("processes.unobserved") == 2, "once for each look that does not come"
    os.write(answer, b"x")


def test_a_look_that_never_comes_back_costs_one_thread_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu_llm.observer.LOOK_WITHIN_S", 0.02)
    monkeypatch.setattr("mgpu_llm.observer.LOADING_EVERY_S", 0.02)
    monkeypatch.setattr("mgpu_llm.observer.HOST_EVERY_S", 0.02)
    stuck, answer = os.pipe()
    looks, told = list[int](), list[Event]()

    def sample() -> tuple[ProcessSample, ...]:
        looks.append(threading.get_ident())
        os.read(stuck, 1)
        return ()

    async def story() -> None:
        before = threading.active_count()
        observer = Observer(Gpus(), {}, time.monotonic, told.append)  # has a thread of its own
        watching = asyncio.create_task(observer.watch(1, (), sample, lambda: True, lambda: Pressure(1.5, None)))
        await until("the host is told many times", lambda: len(told) >= 20)
        assert len(looks) == 1
        assert threading.active_count() <= before + 3
        watching.cancel()

    asyncio.run(story())
    os.write(answer, b"x")


def test_what_fails_in_a_look_is_a_fault_of_ours_and_is_raised() -> None:
    def sample() -> tuple[ProcessSample, ...]:
        raise ValueError("a field that is no number")

    async def story() -> None:
        await Observer(Gpus(), {}, time.monotonic, print).watch(1, (), sample, lambda: True)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(story())
    assert "a field that is no number" in str(raised.value.exceptions)
