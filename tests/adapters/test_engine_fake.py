"""The fake engine does what vLLM was seen to do: other tests rely on it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mgpu_llm.core.events import EngineExited, EngineGone, EngineSpawned, LinesDropped
from tests.support.engine_run import Run, running, until
from tests.support.fake_engine import COMMAND

MODEL = "/models/toy"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fake:
    """The fake engine, run by a real EngineProcess."""

    def __init__(self, run: Run, scenario: str) -> None:
        self.run = run
        self.scenario = scenario
        self.port = free_port()

    async def start(self, *args: str, tp: int = 2, env: dict[str, str] | None = None) -> None:
        size = ("--tensor-parallel-size", str(tp))
        command = (*COMMAND, "serve", MODEL, *size, "--port", str(self.port), *args)
        await self.run.engine.spawn(1, command, {**os.environ, "FAKE_ENGINE": self.scenario, **(env or {})})

    async def ask(self, path: str, body: object = None, key: str = "") -> tuple[int, str]:
        return await asyncio.to_thread(ask, f"http://127.0.0.1:{self.port}{path}", body, key)

    async def serves(self) -> None:
        await self.run.line("Application startup complete")
        deadline = time.monotonic() + 20
        while (await self.ask("/health"))[0] != 200:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    def memory(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"psm_fake{self.port}_*"))

    async def status(self) -> int:
        return (await self.run.first(EngineExited)).status


def ask(url: str, body: object, key: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        return 0, str(error)


@pytest.mark.parametrize("log", ["cuda", "cpu"])
def test_it_loads_in_phases_in_processes_of_their_own_then_serves_and_ends_when_asked(tmp_path: Path, log: str) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, f"load_s=0.5; log={log}")
            await fake.start()
            await fake.serves()
            assert [sample.name for sample in run.engine.sample()][1:] == [
                "VLLM::EngineCor",
                "VLLM::Worker_TP",
                "VLLM::Worker_TP",
            ]
            top, core, *workers = run.engine.sample()
            assert any(line.startswith(f"(APIServer pid={top.pid}) ") for line in run.lines)
            assert any(line.startswith(f"(EngineCore pid={core.pid}) ") for line in run.lines)
            assert any(line.startswith(f"(Worker_TP1 pid={workers[1].pid}) ") for line in run.lines)
            phases = ["Initializing a V1", "world_size=2", "Loading safetensors", "Loading weights took", "init engine"]
            found = [next(n for n, line in enumerate(run.lines) if phase in line) for phase in phases]
            assert found == sorted(found)
            status, text = await fake.ask("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1})
            assert status == 200
            assert json.loads(text)["choices"][0]["finish_reason"] == "length"
            assert json.loads((await fake.ask("/v1/models"))[1])["data"][0]["id"] == MODEL
            assert "vllm:num_requests_running" in (await fake.ask("/metrics"))[1]
            assert (await fake.ask("/v1/completions", {"model": "other", "prompt": "a"}))[0] == 404
            run.engine.terminate()
            assert await fake.status() == 0
            await until("the tree is gone by itself", lambda: run.engine.pids() == ())
            assert not fake.memory()

    asyncio.run(story())


def test_served_name_and_api_key_and_an_embedding_model(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.1; task=embed")
            await fake.start("--served-model-name", "toy", "--api-key", "secret", tp=1)
            await fake.serves()
            body = {"model": "toy", "input": "a"}
            assert (await fake.ask("/v1/embeddings", body))[0] == 401
            assert (await fake.ask("/v1/embeddings", body, "secret"))[0] == 200
            assert (await fake.ask("/v1/completions", body, "secret"))[0] == 404

    asyncio.run(story())


def test_a_hang_in_distributed_init_is_silent_for_ever_minds_no_sigterm_and_is_ended_by_a_kill(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.3; hang-init=spin unless NCCL_P2P_DISABLE=1")
            await fake.start()
            await run.line("vLLM is using nccl")
            lines = len(run.lines)
            used = [sample.cpu_s for sample in run.engine.sample()[2:]]
            await until(
                "both workers have spun",
                lambda: all(
                    now.cpu_s > before + 0.05 for now, before in zip(run.engine.sample()[2:], used, strict=True)
                ),
            )
            assert len(run.lines) <= lines + 1
            assert (await fake.ask("/health"))[0] == 0
            assert fake.memory()
            await run.engine.kill(20)
            assert run.all(EngineGone)[0].remarks == ()
            assert not fake.memory()

    asyncio.run(story())


def test_it_is_cured_by_its_condition(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(
                run,
                "load_s=0.1; hang-init unless NCCL_P2P_DISABLE=1; oom unless utilisation<=0.8; hang-weights unless tp<=1;"
                " exit=9 unless --enforce-eager; hang-boot unless attempt>=1",
            )
            env = {"NCCL_P2P_DISABLE": "1"}
            await fake.start("--gpu-memory-utilization", "0.8", "--enforce-eager", tp=1, env=env)
            await fake.serves()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("scenario", "status", "word"),
    [
        ("oom", 1, "CUDA out of memory"),
        ("gpu-not-free", 1, "is less than desired GPU memory utilization"),
        ("no-cache-blocks", 1, "No available memory for the cache blocks"),
        ("worker-dies", 1, "died unexpectedly"),
        ("bad-flag", 2, "unrecognized arguments"),
        ("missing-model", 1, "Repo id must be in the form"),
        ("exit=7", 7, "something went wrong"),
        ("sigkill", -9, "0% Completed"),
        ("exit-serving=0", 0, "Application startup complete"),
        ("worker-dies-serving=0", 0, "EngineDeadError"),
    ],
)
def test_it_ends_as_vllm_does(tmp_path: Path, scenario: str, status: int, word: str) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, f"load_s=0.2; {scenario}")
            await fake.start()
            assert await fake.status() == status
            assert any(word in line for line in run.lines)

    asyncio.run(story())


def test_an_unknown_option_is_refused_with_2_and_a_taken_port_with_1(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "")
            await fake.start("--no-such-option")
            assert await fake.status() == 2
            await run.line("unrecognized arguments: --no-such-option")
        async with running(tmp_path) as run:
            fake = Fake(run, "")
            with socket.create_server(("127.0.0.1", fake.port)):
                await fake.start()
                assert await fake.status() == 1
            await run.line("[Errno 98] Address already in use")

    asyncio.run(story())


def test_during_a_load_the_first_sigterm_is_swallowed_and_the_second_ends_it_by_sigint(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.2; hang-weights")
            await fake.start()
            await run.line("1/4")
            run.engine.terminate()
            await asyncio.sleep(1.0)
            assert not run.all(EngineExited)
            run.engine.terminate()
            exited = await run.first(EngineExited)
            assert exited.status == -signal.SIGINT

    asyncio.run(story())


def test_a_killed_api_server_leaves_its_workers_and_strays_and_they_are_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.2; ignore-sigterm; grandchildren=2; hang-weights")
            await fake.start()
            await run.line("1/4")
            run.engine.terminate()
            os.kill((await run.first(EngineSpawned)).pid, signal.SIGKILL)
            await run.first(EngineExited)
            assert len(run.engine.pids()) == 3
            await run.engine.kill(20)
            assert run.all(EngineGone)[0].remarks == ()
            assert not strays()
            assert not fake.memory()

    asyncio.run(story())


def strays() -> list[str]:
    names = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:
            continue
    return [name for name in names if name.startswith("astray")]


def test_chatter_goes_on_in_a_hang(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.1; hang-init; chatter")
            await fake.start()
            await until(
                "two lines of chatter", lambda: sum("No available shared memory" in line for line in run.lines) >= 2
            )

    asyncio.run(story())


def test_a_flood_is_read_to_its_end_and_the_load_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.5; flood=20")
            await fake.start()
            await fake.serves()
            await until("the drops are told", lambda: sum(event.count for event in run.all(LinesDropped)) > 100_000)

    asyncio.run(story())


def test_health_may_turn_bad_and_completions_may_never_come(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.1; mute-completion")
            await fake.start(tp=1)
            await fake.serves()
            assert (await fake.ask("/v1/completions", {"prompt": "a"}))[0] == 0
            assert (await fake.ask("/health"))[0] == 200
        async with running(tmp_path) as run:
            fake = Fake(run, "load_s=0.1; unhealthy=0")
            await fake.start(tp=1)
            await run.line("Application startup complete")
            deadline = time.monotonic() + 20
            while (status := (await fake.ask("/health"))[0]) != 503:
                assert time.monotonic() < deadline
                assert status == 0
                await asyncio.sleep(0.02)

    asyncio.run(story())
