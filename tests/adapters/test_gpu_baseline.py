"""What the GPUs hold before and after an attempt, by a real driver's library made small, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.support.fake_nvml import FakeGpu, FakeNvml

GB = 1_000_000_000
#: Remembers GPUs 0 and 1, goes on at a word, waits until they are free, and tells of an engine that has ended so.
WAITER = """
import asyncio, json, sys, time
from dataclasses import asdict
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.core.events import EngineGone, EngineSpawned, EngineStuck
from mgpu_llm.gpu_baseline import Baseline
from tests.support.fake_nvml.asked import uuid
async def main():
    told = asyncio.Queue()
    baseline = Baseline(Gpus(), {str(n): uuid(n) for n in range(2)}, time.monotonic, told.put_nowait)
    await baseline.remember(sys.argv[1].split(","))
    print("remembered", flush=True)
    for line in sys.stdin:
        word = line.split()
        if word[0] == "wait":
            remarks = await baseline.wait_until_free(float(word[1]))
            baseline.tell(EngineGone(at=1, attempt=1, remarks=remarks))
        elif word[0] == "spawned":
            baseline.tell(EngineSpawned(at=1, attempt=1, pid=70))
        elif word[0] == "lacking":
            needed = {str(n): float(part) for n, part in enumerate(word[1:])}
            print("TOLD " + json.dumps(baseline.lacking(needed)), flush=True)
            continue
        elif word[0] == "stuck":
            baseline.tell(EngineStuck(at=1, attempt=1, holders=("pid 71 (VLLM::Worker, state D)",)))
        else:
            await baseline.remember(sys.argv[1].split(","))
            print("remembered", flush=True)
            continue
        print("TOLD " + json.dumps(asdict(await told.get())), flush=True)
asyncio.run(main())
"""


class Waiter:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.said = self.until("remembered")

    def until(self, beginning: str) -> list[str]:
        lines = list[str]()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.append(line.strip())
            if line.startswith(beginning):
                return lines
        raise AssertionError(f"it ended: {lines}")

    def ask(self, *words: str) -> Any:
        self.say(*words)
        return json.loads(self.until("TOLD ")[-1].removeprefix("TOLD "))

    def say(self, *words: str) -> None:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)


@contextmanager
def waiting(nvml: FakeNvml, before: Sequence[FakeGpu], visible: str = "0,1") -> Iterator[Waiter]:
    nvml.set(before)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **nvml.environment()}
    with subprocess.Popen(
        [sys.executable, "-c", WAITER, visible], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        yield Waiter(process)
        process.kill()


@contextmanager
def somebody(*words: str) -> Iterator[int]:
    """A process that lives, with these words in its command line."""
    with subprocess.Popen(["/bin/sh", "-c", 'read line; : "$@"', "sh", *words], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def dead() -> int:
    """The pid of a process that is no more."""
    with subprocess.Popen(["/bin/true"]) as process:
        process.wait()
    return process.pid


def test_gpus_that_hold_what_they_held_before_are_free_at_once(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu(used_bytes=3 * GB)] * 2) as waiter:
        nvml.set([FakeGpu(used_bytes=3 * GB + 200_000_000)] * 2)
        assert waiter.ask("wait", "600") == {"at": 1, "attempt": 1, "remarks": [], "dirty": []}


def test_who_still_holds_memory_is_named_with_user_command_and_bytes_and_the_gpu_is_not_out(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter, somebody("--api-key", "sk-1", "line\none") as pid:
        nvml.set([FakeGpu(used_bytes=5 * GB, processes=((pid, 4 * GB), (dead(), GB))), FakeGpu()])
        answer = waiter.ask("wait", "0")
        (said,) = answer["remarks"]
        assert said.startswith(f"GPU 0 still holds 5.00 GB more than before the attempt: pid {pid} (user ")
        assert said.endswith(") holds 4.00 GB")
        assert "/bin/sh -c read line" in said
        assert "sk-1" not in said
        assert answer["dirty"] == []


@pytest.mark.parametrize("processes", [(), "dead"])
def test_memory_that_no_living_process_holds_makes_the_gpu_unusable(nvml: FakeNvml, processes: object) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter:
        nvml.set([FakeGpu(), FakeGpu(used_bytes=5 * GB, processes=((dead(), 5 * GB),) if processes else ())])
        answer = waiter.ask("wait", "0")
        why = "GPU 1 still holds 5.00 GB more than before the attempt although no process is left that uses it"
        assert (answer["remarks"], answer["dirty"]) == ([], [["1", why]])


def test_a_gpu_that_runs_on_without_a_process_is_out_and_one_on_which_another_computes_is_free(nvml: FakeNvml) -> None:
    busy = FakeGpu(utilisation_percent=100)
    with waiting(nvml, [FakeGpu()] * 2) as waiter, somebody() as pid:
        nvml.set([busy, FakeGpu(utilisation_percent=99, processes=((pid, GB),))])
        answer = waiter.ask("wait", "0")
        why = "GPU 0 is still at 100 % although no process is left that uses it"
        assert (answer["remarks"], answer["dirty"]) == ([], [["0", why]])
        waiter.say("remember")  # it was busy before, so that is nothing new
        waiter.until("remembered")
        assert waiter.ask("wait", "0")["dirty"] == []


def test_a_gpu_whose_memory_a_desktop_has_taken_meanwhile_is_not_out(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter, somebody("Xorg") as pid:
        nvml.set([FakeGpu(used_bytes=5 * GB, utilisation_percent=99, graphics=((pid, 5 * GB),)), FakeGpu()])
        answer = waiter.ask("wait", "0")
        (said,) = answer["remarks"]
        assert said.startswith(f"GPU 0 still holds 5.00 GB more than before the attempt: pid {pid} (user ")
        assert answer["dirty"] == []


def test_a_gpu_that_is_let_go_of_while_it_is_judged_is_not_out(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter:
        before = len(nvml.calls())
        nvml.set([FakeGpu(used_bytes=5 * GB), FakeGpu()])
        waiter.say("wait", "0")
        while "nvmlDeviceGetGraphicsRunningProcesses_v3" not in {call for call, _, _ in nvml.calls()[before:]}:
            time.sleep(0.01)
        nvml.set([FakeGpu()] * 2)
        answer = json.loads(waiter.until("TOLD ")[-1].removeprefix("TOLD "))
        assert (answer["remarks"], answer["dirty"]) == ([], [])


def test_a_driver_that_is_silent_is_told_and_makes_no_gpu_unusable(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter:
        nvml.unload()
        answer = waiter.ask("wait", "0")
        assert answer["remarks"][0].startswith("cannot see whether the GPUs are free again: ")
        assert answer["dirty"] == []


def test_where_nothing_was_remembered_nothing_is_waited_for(nvml: FakeNvml) -> None:
    with waiting(nvml, []) as waiter:
        nvml.set([FakeGpu(used_bytes=5 * GB)] * 2)
        assert waiter.ask("wait", "600")["remarks"] == []
        # And a stuck engine may keep any of them.
        assert [entry for entry, _ in waiter.ask("stuck")["dirty"]] == ["0", "1"]


def test_a_stuck_process_takes_those_gpus_with_it_on_which_something_is_left(nvml: FakeNvml) -> None:
    with waiting(nvml, [FakeGpu()] * 2) as waiter:
        nvml.set([FakeGpu(), FakeGpu(used_bytes=GB)])
        why = "pid 71 (VLLM::Worker, state D) cannot be ended: the kernel does not let it go"
        assert waiter.ask("stuck")["dirty"] == [["1", why]]
        nvml.set([FakeGpu(utilisation_percent=100), FakeGpu()])
        assert waiter.ask("stuck")["dirty"] == [["0", why]]
        nvml.set([FakeGpu(processes=((72, GB),)), FakeGpu(processes=((71, None),))])
        assert waiter.ask("stuck")["dirty"] == [["1", why]]
        nvml.set([FakeGpu()] * 2)
        assert waiter.ask("stuck")["dirty"] == []
        nvml.unload()
        assert [entry for entry, _ in waiter.ask("stuck")["dirty"]] == ["0", "1"]


def test_who_holds_much_memory_before_an_attempt_is_told_once_and_a_little_is_nothing(nvml: FakeNvml) -> None:
    with somebody("train.py") as pid:
        taken = [FakeGpu(used_bytes=30 * GB, processes=((pid, 30 * GB),)), FakeGpu(used_bytes=GB)]
        with waiting(nvml, taken) as waiter:
            said, *_ = waiter.said
            assert "gpus.taken" in said
            assert f"GPU 0 holds 30.00 GB before the attempt: pid {pid} (user " in said
            assert "train.py) holds 30.00 GB" in said
            waiter.say("remember")
            assert waiter.until("remembered") == ["remembered"]
            assert [what.split(":")[0] for what in waiter.ask("spawned")["taken"]] == [
                "GPU 0 holds 30.00 GB before the attempt"
            ]
            nvml.set([FakeGpu(), FakeGpu(used_bytes=7 * GB)])
            waiter.say("remember")
            (said, _) = waiter.until("remembered")
            assert "GPU 1 holds 7.00 GB before the attempt: the driver names no process that can be seen here" in said


def test_less_than_an_engine_needs_to_find_free_is_told_of_the_gpu_that_has_the_least(nvml: FakeNvml) -> None:
    with somebody("train.py") as pid:
        taken = [FakeGpu(total_bytes=80 << 30, used_bytes=9 << 30), FakeGpu(total_bytes=80 << 30, used_bytes=28 << 30)]
        taken[1] = replace(taken[1], processes=((pid, 28 << 30),))
        with waiting(nvml, taken) as waiter:
            rank, said = waiter.ask("lacking", "0.9", "0.9")
            assert (rank, said.split(": ")[0]) == (
                1,
                "GPU 1 has 52.00 of 80.00 GiB free, and utilisation 0.9 asks for more",
            )
            assert f": pid {pid} (user " in said
            assert "train.py) holds 30.06 GB" in said
            rank, said = waiter.ask("lacking", "0.9", "0.6")
            assert (rank, said.startswith("GPU 0 has 71.00 of 80.00 GiB free, and ")) == (0, True)
            assert said.endswith(": the driver names no process that can be seen here; it may be of a container")


def test_room_enough_or_a_driver_that_says_nothing_keeps_no_engine_from_its_load(nvml: FakeNvml) -> None:
    just = FakeGpu(total_bytes=80 << 30, used_bytes=(8 << 30) + (200 << 20))
    with waiting(nvml, [just, FakeGpu(total_bytes=80 << 30)]) as waiter:
        assert waiter.ask("lacking", "0.9", "0.9") is None, "what is left open by the driver's own reserve"
        assert waiter.ask("lacking", "1.0", "1.0")[0] == 0
        assert waiter.ask("lacking") is None
        nvml.unload()
        waiter.say("remember")
        waiter.until("remembered")
        assert waiter.ask("lacking", "1.0", "1.0") is None
    with waiting(nvml, [FakeGpu(total_bytes=8 << 30, used_bytes=900 << 20)] * 2) as waiter:
        assert waiter.ask("lacking", "1.0", "1.0") is None, "a desktop"
