"""`mgpuctl gpus` with a real mgpud on a simulated NVIDIA driver: from the daemon, without one, and of a driver that is silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, fact, remains, until
from tests.support.daemons import MGPUCTL, MGPUD
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid

GPUS = {"gpus.use": [3, 2], "gpus.tensor_parallel": None}
GIB = 2**30


def run(nvml: FakeNvml, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **nvml.environment()}
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False, timeout=LIMIT_S)


def told(life: Life) -> dict[str, Any]:
    done = life.ctl("gpus", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def flags(document: dict[str, Any]) -> list[tuple[bool, bool]]:
    return [(gpu["configured"], gpu["in_use"]) for gpu in document["gpus"]]


def test_a_daemon_tells_its_own_gpus_and_processes_from_others_and_a_lost_gpu_from_one_that_works(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4, nvlinks=[(2, 3)])
    life = begin(settings=GPUS, environ=nvml.environment())
    engine = life.ready()["pid"]
    nvml.change(3, used_bytes=70 * GIB, processes=((engine, 70 * GIB), (os.getpid(), None)))
    nvml.change(0, ecc_errors=2)
    document = told(life)
    assert flags(document) == [(False, False), (False, False), (True, True), (True, True)]
    ours, other = document["gpus"][3]["processes"]
    assert (ours["pid"], ours["used_bytes"], ours["of_the_engine"]) == (engine, 70 * GIB, True)
    assert (other["pid"], other["of_the_engine"], bool(other["command"])) == (os.getpid(), False, True)
    assert [pair["gpus"] for pair in document["pairs"] if pair["nvlink"]] == [[2, 3]]
    page = life.ctl("gpus").stdout.splitlines()
    assert [line.split()[0] for line in page[1:6]] == ["0", "errors", "1", "*", "*"]
    assert f"     {engine}  {ours['user']}, this engine  70.0 GiB" in "\n".join(page)
    nvml.change(1, lost=True)
    document = told(life)
    assert [gpu["lost"] for gpu in document["gpus"]] == ["", "GPU is lost (NVML error 15)", "", ""]
    nvml.set([FakeGpu()] * 3)
    assert told(life)["missing"] == [uuid(3)]
    nvml.set([FakeGpu()] * 4)
    assert life.ctl("stop").returncode == 0
    life.wait_until("stopped", LIMIT_S)
    assert flags(told(life)) == [(False, False), (False, False), (True, False), (True, False)]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_driver_that_blocks_is_said_in_time_and_the_daemon_answers_all_else_and_ends(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4)
    life = begin(settings={**GPUS, "stop.kill_deadline": 1}, environ=nvml.environment())
    life.ready()
    nvml.set([FakeGpu()] * 4, ["nvmlDeviceGetTemperature block gpu 1"])
    done = life.ctl("gpus")
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr.startswith("mgpuctl: the NVIDIA driver has not answered for ")
    assert life.ctl("status").returncode == 0
    # It waits for the GPUs to be free as long as it may, and then says that it could not see it.
    assert life.stop() == 0
    (left,) = life.told("engine.left")
    assert "has not answered" in fact(left, "what")
    assert remains(life.setup) == []


def test_without_a_daemon_mgpud_looks_and_needs_no_config(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(processes=((os.getpid(), 5 * GIB),)), FakeGpu(reset_required=True)])
    done = run(nvml, MGPUCTL, "--socket", tmp_path / "none", "gpus", "--json")
    assert done.returncode == 0
    assert done.stderr.startswith("mgpuctl: no daemon answers on ")
    document = json.loads(done.stdout)
    assert flags(document) == [(False, False)] * 2
    assert [gpu["lost"] for gpu in document["gpus"]] == ["", "GPU requires restart (NVML error 16)"]
    assert document["gpus"][0]["processes"][0]["pid"] == os.getpid()


def test_mgpud_without_a_driver_tells_the_cure(nvml: FakeNvml) -> None:
    done = run(nvml, MGPUD, "--gpus")
    assert (done.returncode, done.stdout) == (75, "")
    assert (
        done.stderr == 'cannot list the GPUs: Driver Not Loaded (NVML error 9); load the driver ("modprobe nvidia")\n'
    )


def test_mgpud_ends_though_the_driver_never_answers(nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()], ["nvmlInit block"])
    code = "import asyncio; from mgpu_llm import questions; asyncio.run(questions.gpus(deadline_s=0.3))"
    done = run(nvml, sys.executable, "-c", code)
    assert done.returncode == 1
    assert "CannotStartError: the NVIDIA driver has not answered for " in done.stderr
    until("it was asked", lambda: bool(nvml.calls()))


def test_two_questions_at_once_are_a_wrong_command(nvml: FakeNvml) -> None:
    done = run(nvml, MGPUD, "--gpus", "--check")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--gpus are several questions" in done.stderr
