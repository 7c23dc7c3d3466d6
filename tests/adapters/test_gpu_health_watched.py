"""GPUs that come to be unusable, as a real observer tells it: NVML made small, and a pipe that stands in for /dev/kmsg."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm import gpu_health
from mgpu_llm.adapters.gpus import GpuHealth, GpusUnobserved
from mgpu_llm.core.events import Event, GpuUnfit
from mgpu_llm.core.xid import Action
from mgpu_llm.gpu_health import HealthWatch
from tests.support.engine_run import until
from tests.support.fake_nvml import FakeGpu, FakeNvml

LOST = "GPU is lost (NVML error 15)"
SOUND = ("", "")


def watched(
    monkeypatch: pytest.MonkeyPatch, *answers: Sequence[tuple[str, str]] | None
) -> list[tuple[str, Action, str]]:
    """What is told of GPUs "0" and "1" whose health is `answers`, each (lost, recovery action), one after the other; None is a
    silent driver. The last answer stands for ever."""
    monkeypatch.setattr(gpu_health, "EVERY_S", 0.0)
    monkeypatch.setattr(gpu_health, "AGAIN_S", 0.0)
    told, left, asked = list[Event](), list(answers), list[int]()

    async def ask(uuids: Sequence[str]) -> tuple[GpuHealth, ...]:
        asked.append(len(uuids))
        answer = left.pop(0) if len(left) > 1 else left[0]
        if answer is None:
            raise GpusUnobserved("the driver did not answer within 2 s")
        pairs = zip(uuids, answer, strict=True)
        return tuple(GpuHealth(uuid=uuid, lost=lost, recovery_action=action) for uuid, (lost, action) in pairs)

    async def story() -> None:
        watch = HealthWatch(3, {"GPU-a": "0", "GPU-b": "1"}, ask, time.monotonic, told.append)
        watching = asyncio.create_task(watch.run())
        await until("it was asked often enough", lambda: len(asked) >= len(answers) + 6)
        watching.cancel()

    asyncio.run(story())
    assert all(isinstance(event, GpuUnfit) and event.attempt == 3 for event in told)
    return [(event.gpu, event.action, event.what) for event in told if isinstance(event, GpuUnfit)]


def test_a_gpu_that_is_lost_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, (SOUND, SOUND), (SOUND, (LOST, ""))) == [("1", Action.LOST, LOST)]


def test_what_is_seen_once_only_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    once = (SOUND, (LOST, ""))
    assert watched(monkeypatch, once, (SOUND, SOUND), (SOUND, SOUND)) == []
    assert watched(monkeypatch, once, None, (SOUND, SOUND)) == []


def test_a_silent_driver_says_nothing_of_any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, None) == []


@pytest.mark.parametrize(
    ("health", "action"),
    [
        (("", "reset"), Action.RESET),
        (("", "bus-reset"), Action.RESET),
        (("", "drain-p2p"), Action.RESET),
        (("", "reboot"), Action.REBOOT),
        (("", "system-reboot"), Action.REBOOT),
        (("", "drain-and-reset"), Action.DRAIN),
        (("", "recover-imex-domain"), Action.DRAIN),
        (("", "unknown-9"), Action.DRAIN),
        (("GPU requires restart (NVML error 16)", ""), Action.RESET),
        ((LOST, "reset"), Action.LOST),
    ],
)
def test_what_the_driver_asks_for_is_told_as_what_has_to_be_done(
    monkeypatch: pytest.MonkeyPatch, health: tuple[str, str], action: Action
) -> None:
    ((gpu, told, what),) = watched(monkeypatch, (health, SOUND))
    assert (gpu, told) == ("0", action)
    assert (health[0] or health[1]) in what


def test_who_is_hurried_looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_health, "EVERY_S", 1e6)
    asked = list[float]()

    async def ask(uuids: Sequence[str]) -> tuple[GpuHealth, ...]:
        asked.append(time.monotonic())
        return ()

    async def story() -> None:
        watch = HealthWatch(1, {"GPU-a": "0"}, ask, time.monotonic, list[Event]().append)
        watching = asyncio.create_task(watch.run())
        for count in (1, 2, 3):
            await until(f"it has looked {count} times", lambda count=count: len(asked) == count)  # type: ignore[misc]
            watch.hurry()
        watching.cancel()

    asyncio.run(story())


def test_one_that_gets_worse_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drain, lost = (SOUND, ("", "drain-and-reset")), (SOUND, (LOST, ""))
    told = watched(monkeypatch, drain, drain, lost, lost)
    assert [action for _, action, _ in told] == [Action.DRAIN, Action.LOST]


# -- by a real observer, of a driver made small ------------------------------------------------------------------------

WATCH = """
import asyncio, json, os, sys, time
from pathlib import Path
from mgpu_llm import gpu_health
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.host import kernel_follower
from mgpu_llm.core import kernel
from mgpu_llm.core.events import GpusSampled, GpusUnobserved, GpuUnfit, KernelSaid
from mgpu_llm.observer import Observer
from tests.support.fake_nvml.asked import uuid
gpu_health.EVERY_S = 1e6  # so that it is the failing samples that make it look
def told_of(event):
    if isinstance(event, GpuUnfit): return ["unfit", event.gpu, event.action, event.what]
    if isinstance(event, KernelSaid): return ["kernel", event.text, list(event.gpus)]
    return ["sampled"] if isinstance(event, GpusSampled) else ["unobserved"] if isinstance(event, GpusUnobserved) else []
async def story():
    told = asyncio.Queue()
    follow = lambda: kernel_follower.follow(time.monotonic, kernel.tells, Path(sys.argv[1]))
    observer = Observer(Gpus(), {"3": uuid(0), "5": uuid(1)}, time.monotonic, told.put_nowait, follow)
    watching = asyncio.create_task(observer.watch(1, ("3", "5"), lambda: (), lambda: True))
    while True:
        if told_of(event := await told.get()): print(json.dumps(told_of(event)), flush=True)
asyncio.run(story())
"""


def until_told(process: subprocess.Popen[str], kind: str) -> list[Any]:
    """The first of that kind that it tells from now on."""
    assert process.stdout is not None
    while True:
        line = process.stdout.readline()
        assert line, "it has ended"
        if (told := json.loads(line))[0] == kind:
            return list(told)


def test_an_observer_tells_which_gpu_is_lost_and_of_which_the_kernel_speaks(tmp_path: Path, library: Path) -> None:
    nvml = FakeNvml(tmp_path, library)
    nvml.set([FakeGpu(), FakeGpu()])  # at 00000000:10:00.0 and 00000000:11:00.0
    os.mkfifo(tmp_path / "kmsg")
    writer = os.open(tmp_path / "kmsg", os.O_RDWR)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **nvml.environment()}
    command = [sys.executable, "-c", WATCH, str(tmp_path / "kmsg")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            until_told(process, "sampled")
            said, named = "NVRM: Xid (PCI:0000:11:00): 31, pid=71", list[str]()
            while not named:  # until the addresses are known
                os.write(writer, f"4,1,1000,-;{said}\n".encode())
                _, text, named = until_told(process, "kernel")
                time.sleep(0.1)  # only so many lines are handed on
            assert (text, named) == (said, ["5"])
            nvml.set([FakeGpu(), FakeGpu(lost=True)])
            _, gpu, action, what = until_told(process, "unfit")
            assert (gpu, action) == ("5", "lost")
            assert "NVML error 15" in what
            # Of readings there is all or nothing, and that is told as well.
            until_told(process, "unobserved")
        finally:
            process.kill()
    os.close(writer)
