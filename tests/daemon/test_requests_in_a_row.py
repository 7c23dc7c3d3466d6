"""Requests that come faster than the loop takes them up."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from mgpu_llm.adapters.console import Console
from mgpu_llm.adapters.engine.ledger import Ledger
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.health import Probes
from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.adapters.memory.history import History
from mgpu_llm.adapters.memory.known_good import KnownGoodRung
from mgpu_llm.adapters.preflight import Preflight
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.adapters.systemd import SystemdNotifier
from mgpu_llm.chronicle import Chronicle
from mgpu_llm.collector import Collector
from mgpu_llm.config.parse import parse
from mgpu_llm.core.endpoint import Endpoint
from mgpu_llm.core.events import Event, StartRequested, StopRequested
from mgpu_llm.core.launch import Server
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Ready, Stopped
from mgpu_llm.gpu_baseline import Baseline
from mgpu_llm.gpu_json import GpuReport
from mgpu_llm.observer import Observer
from mgpu_llm.performer import Outside
from mgpu_llm.reloading import Reloading
from mgpu_llm.remains import Remains
from mgpu_llm.runner import Audience, Runner
from tests.core.everything import POLICY, STATES


def runner(folder: Path, events: asyncio.Queue[Event]) -> Runner:
    """One whose loop does not run, so that nothing is taken up."""
    clock = time.monotonic
    endpoint = Endpoint(url="http://127.0.0.1:1", uds=None, api_key=None, served_name=None)
    engine = EngineProcess(clock=clock, emit=events.put_nowait, runtime_dir=folder)
    incidents = Incidents(None, keep=0, max_bytes=0)
    collector = Collector(engine=engine, gpus=Gpus(), incidents=incidents, recording=str, model="toy", state_dir="/")
    outside = Outside(
        engine=engine,
        collector=collector,
        incidents=incidents,
        nccl_folder=folder,
        observer=Observer(Gpus(), {}, clock, events.put_nowait),
        baseline=Baseline(Gpus(), {}, clock, events.put_nowait),
        remains=Remains(Ledger(folder), engine.pids),
        preflight=Preflight(python=(), memory=None, key={}, deadline_s=1, clock=clock),
        uuids={},
        probes=Probes(endpoint, health_timeout_s=1, completion_timeout_s=1),
        server=Server(command=("vllm",), model="toy"),
        url=endpoint.url,
        environment={},
        chronicle=Chronicle(Recorder(None, keep=0, max_bytes=0), History(None), KnownGoodRung(None), "toy"),
        kill_deadline_s=1,
        engine_socket=None,
        address_trouble=str,
    )
    identity = Identity(version="0", model="toy", url=endpoint.url)
    audience = Audience(notifier=SystemdNotifier({}), console=Console(sys.stderr), watchdog_interval_s=None)
    reloading = Reloading(parse([], folder / "mgpu-llm.toml"), {}, None, outside.probes)
    return Runner(POLICY, identity, clock, events, outside, audience, GpuReport(Gpus()), reloading, {})


@pytest.mark.parametrize(
    ("state", "verbs", "wanted"),
    [
        (Stopped, ("start", "stop"), [StartRequested, StopRequested]),
        (Ready, ("stop", "start"), [StopRequested, StartRequested]),
    ],
)
def test_a_request_that_takes_back_the_last_one_is_not_lost(
    tmp_path: Path, state: type, verbs: tuple[str, str], wanted: list[type]
) -> None:
    async def story() -> list[type]:
        events: asyncio.Queue[Event] = asyncio.Queue()
        asked = runner(tmp_path, events)
        asked._state = next(known for known in STATES if isinstance(known, state))
        for verb in verbs:
            asked.request(verb, "somebody")
        return [type(events.get_nowait()) for _ in range(events.qsize())]

    assert asyncio.run(story()) == wanted
