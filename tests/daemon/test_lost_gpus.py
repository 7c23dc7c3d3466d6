"""A start on a simulated driver that has lost GPUs: it goes on without them where that suffices, and says what is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from mgpu_llm.core.unusable import ADVICE
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, environ_of, fact, remains
from tests.support.checkpoints import QWEN_7B, write_model
from tests.support.daemons import MGPUD
from tests.support.fake_engine import COMMAND
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid
from tests.support.fake_setup import FakeSetup

SOUND: Final = FakeGpu()
LOST: Final = FakeGpu(lost=True)
WHY: Final = "GPU is lost (NVML error 15)"
TWO: Final = {"gpus.use": [3, 1], "gpus.tensor_parallel": None}
#: Does what vLLM does at its import (0.32.0, platforms/cuda.py, log_warnings), and only then becomes the fake engine.
IMPORTING: Final = """
import os, sys, pynvml

class NvmlCudaPlatform:
    @classmethod
    def _get_physical_device_name(cls, device_id):
        handle = pynvml.nvmlDeviceGetHandleByIndex(device_id)
        return pynvml.nvmlDeviceGetName(handle)

    @classmethod
    def log_warnings(cls):
        device_ids = pynvml.nvmlDeviceGetCount()
        if device_ids > 1:
            device_names = [cls._get_physical_device_name(i) for i in range(device_ids)]

pynvml.nvmlInit()
NvmlCudaPlatform.log_warnings()
os.execv(sys.argv[1], sys.argv[1:])
"""
SLICES: Final = ("MIG-377e0049-554c-540b-93c6-d0976f8426cb", "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27")


def asked(setup: FakeSetup, nvml: FakeNvml, *question: str) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the lines of stderr that speak of GPUs."""
    command = [str(MGPUD), "--config", str(setup.write()), *question]
    environ = {**os.environ, **nvml.environment()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environ)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if "GPU" in line]


def setup(folder: Path, settings: dict[str, object]) -> FakeSetup:
    folder.mkdir(exist_ok=True)
    return FakeSetup(folder=folder, settings={"gpus.tensor_parallel": None, **settings})


def rungs(document: str) -> list[str]:
    (plan,) = json.loads(document)["plans"]
    return [rung["name"] for rung in plan["rungs"]]


def test_a_lost_gpu_that_the_config_does_not_name_is_a_warning_and_no_more(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([SOUND, SOUND, LOST, SOUND])
    life = begin(settings=TWO, environ=nvml.environment())
    status = life.ready()
    assert (status["rung"], status["degraded"], status["gpus_out"]) == ("base", False, [])
    assert environ_of(status["pid"])["CUDA_VISIBLE_DEVICES"] == "3,1"
    (told,) = life.told("gpu.lost")
    assert (fact(told, "gpu"), fact(told, "why")) == ("2", WHY)
    assert fact(told, "consequence").startswith("not used here, but vLLM (up to 0.32 at least) asks all GPUs")
    assert life.told("gpu.out") == []
    document = json.loads(life.ctl("gpus", "--json").stdout)
    assert [(gpu["lost"], gpu["in_use"]) for gpu in document["gpus"]] == [
        ("", False),
        ("", True),
        (WHY, False),
        ("", True),
    ]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_lost_gpu_of_the_config_is_out_from_the_beginning_and_a_spare_stands_in(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([SOUND, LOST, SOUND, SOUND], nvlinks=[(2, 3)])
    life = begin(settings={**TWO, "gpus.spares": [2]}, environ=nvml.environment())
    status = life.ready()
    assert (status["rung"], status["attempt"], status["degraded"]) == ("gpus-3,2", 1, True)
    assert environ_of(status["pid"])["CUDA_VISIBLE_DEVICES"] == "3,2"
    assert [gpu["uuid"] for gpu in status["gpus"]] == [uuid(3), uuid(2)]
    assert status["gpus_out"] == [f"GPU 1 is out: {WHY}; {ADVICE}"]
    assert "GPU out" in life.ctl("status").stdout
    (said,) = life.told("gpu.out")
    assert (fact(said, "gpu"), fact(said, "why"), fact(said, "advice")) == ("1", WHY, ADVICE)
    assert life.told("gpu.lost") == []
    document = json.loads(life.ctl("gpus", "--json").stdout)
    assert [gpu["configured"] for gpu in document["gpus"]] == [False, True, True, True]
    assert document["missing"] == []
    assert rungs(life.ctl("plan", "--json").stdout)[0] == "gpus-3,2"
    assert sorted(file.stem.partition("GPU-")[2] for file in life.setup.folder.glob("*GPU-*")) == [
        uuid(2)[4:],
        uuid(3)[4:],
    ]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_without_a_spare_it_starts_on_fewer_and_once_the_lost_one_is_back_the_next_daemon_takes_it(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND] * 2, ["nvmlDeviceGetHandleByIndex error 999 gpu 0"])
    life = begin(settings={"gpus.use": "all", "gpus.tensor_parallel": None}, environ=nvml.environment())
    status = life.ready()
    assert (status["rung"], status["changes"]) == ("gpus-1", ["GPUs 0,1 -> 1", "--tensor-parallel-size 2 -> 1"])
    assert environ_of(status["pid"])["CUDA_VISIBLE_DEVICES"] == "1"
    assert status["gpus_out"] == [f"GPU 0 is out: Unknown Error (NVML error 999); {ADVICE}"]
    assert life.stop() == 0
    nvml.set([SOUND] * 2)
    again = type(life)(life.setup, life.setup.folder / "log2", nvml.environment())
    try:
        assert again.ready()["rung"] == "base"
        assert "GPUs" in again.told("rung.forgotten")[0]
    finally:
        assert again.stop() == 0
    assert remains(life.setup) == []


def test_one_that_the_config_names_by_its_uuid_is_taken_for_the_lost_one_and_so_is_a_slice(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([LOST, FakeGpu(slices=((SLICES[1], 40 << 30),)), SOUND])
    common: dict[str, object] = {"gpus.tensor_parallel": None}
    whole = begin(settings={**common, "gpus.use": [uuid(0)], "gpus.spares": [2]}, environ=nvml.environment())
    part = begin(settings={**common, "gpus.use": [SLICES[0]], "gpus.spares": [SLICES[1]]}, environ=nvml.environment())
    status = whole.ready()
    assert (status["rung"], environ_of(status["pid"])["CUDA_VISIBLE_DEVICES"]) == ("gpus-2", "2")
    (out,) = status["gpus_out"]
    assert out.startswith(f'GPU 0 is out: {WHY}; no GPU that answers has "{uuid(0)}"; ')
    status = part.ready()
    assert environ_of(status["pid"])["CUDA_VISIBLE_DEVICES"] == SLICES[1]
    (out,) = status["gpus_out"]
    assert out.startswith(f"GPU {SLICES[0]} is out: {WHY}; ")
    for life in (whole, part):
        assert life.stop() == 0
        assert remains(life.setup) == []


@pytest.mark.parametrize(
    ("lost", "use", "status"), [("lost", [0, 1], 65), ("error 999", [0, 1], 65), ("lost", [0, 2], 69)]
)
def test_an_engine_that_asks_all_gpus_at_its_import_is_begun_once_and_again_when_the_driver_counts_the_lost_one_no_more(
    begin: Begin, nvml: FakeNvml, tmp_path: Path, lost: str, use: list[int], status: int
) -> None:
    script = tmp_path / "importing.py"
    script.write_text(IMPORTING)
    settings = {
        "gpus.use": use,
        "gpus.tensor_parallel": None,
        "engine.command": [sys.executable, str(script), *COMMAND, "serve"],
    }
    if lost == "lost":
        nvml.set([SOUND, SOUND, LOST])
    else:
        nvml.set([SOUND] * 3, ["nvmlDeviceGetHandleByIndex error 999 gpu 2"])
    life = begin(settings=settings, environ=nvml.environment())
    assert life.ended() == status
    assert len(life.told("engine.starting")) == 1
    (failed,) = life.told("engine.refused")
    assert fact(failed, "cause") == "gpu-lost-at-import"
    (gave_up,) = life.told("daemon.gave-up")
    assert "/sys/bus/pci/devices/ADDRESS/remove" in gave_up
    assert "gpus.use" not in gave_up
    nvml.set([SOUND] * (2 if status == 65 else 3))
    again = begin(settings=settings, environ=nvml.environment())
    assert again.ready()["rung"] == "base"
    assert again.stop() == 0
    assert remains(life.setup) == remains(again.setup) == []


def test_where_what_is_left_does_not_suffice_it_ends_with_the_reason_and_a_check_says_so_before(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND, LOST])
    pinned = {"gpus.use": [0, 1], "gpus.tensor_parallel": None, "ladder.pin": ["gpus"]}
    life = begin(settings=pinned, environ=nvml.environment())
    assert life.ended() == 69
    assert life.told("engine.starting") == []
    why = f"gave up: GPU 1 must not be used any more: {WHY}; no other GPUs suffice (another GPU: ladder.pin names"
    assert why in life.log()
    code, out, said = asked(life.setup, nvml, "--check")
    assert (code, out, len(said)) == (69, "", 1)
    assert said[0].startswith(why)
    code, out, said = asked(life.setup, nvml, "--plan", "unknown")
    assert (code, rungs(out), said) == (0, [], [f"remark: GPU 1 is out: {WHY}; {ADVICE}"])
    assert json.loads(out)["plans"][0]["status"] == 69
    assert remains(life.setup) == []


def test_where_all_are_lost_it_is_to_be_tried_again(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([LOST, FakeGpu(reset_required=True)])
    life = begin(settings={"gpus.use": [0], "gpus.tensor_parallel": None}, environ=nvml.environment())
    assert life.ended() == 75
    told = f"no GPU of this host can be used: GPU 0: {WHY}; GPU 1: GPU requires restart (NVML error 16); reset them"
    assert told in life.log()
    code, out, said = asked(life.setup, nvml, "--check")
    assert (code, out, len(said)) == (75, "", 1)
    assert said[0].startswith(told)


def test_a_check_and_a_plan_tell_of_lost_gpus_and_begin_where_a_start_would(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([SOUND, LOST, SOUND])
    named = setup(tmp_path / "named", {"gpus.use": [0, 1]})
    code, out, said = asked(named, nvml, "--check")
    assert (code, said) == (0, [f"remark: GPU 1 is out: {WHY}; {ADVICE}"])
    assert "  tp-1: GPUs 0,1 -> 0; --tensor-parallel-size 2 -> 1" in out.splitlines()
    code, out, again = asked(named, nvml, "--plan", "nccl-p2p-unseen")
    assert (code, again, rungs(out)[0]) == (0, said, "tp-1")
    other = setup(tmp_path / "other", {"gpus.use": [0, 2]})
    code, out, said = asked(other, nvml, "--check")
    assert (code, said) == (0, [f"remark: GPU 1 is lost, and this config does not name it: {WHY}"])
    assert "  base: as configured" in out.splitlines()


def test_what_cannot_fit_on_the_gpus_that_are_left_is_not_begun(tmp_path: Path, nvml: FakeNvml) -> None:
    small = 14_000_000_000
    nvml.set([FakeGpu(total_bytes=small), LOST])
    model = write_model(tmp_path / "weighed", QWEN_7B)
    settings: dict[str, object] = {"gpus.use": [0, 1], "model.path": str(model)}
    code, _, said = asked(setup(tmp_path, settings), nvml, "--check")
    assert code == 69
    assert "1 GPU does not hold 14.2 GiB of weights at utilisation 0.9" in said[0]
    nvml.set([FakeGpu(total_bytes=small), LOST, FakeGpu(total_bytes=small)])
    spare = setup(tmp_path / "spare", {**settings, "gpus.spares": [2]})
    code, out, _ = asked(spare, nvml, "--check")
    assert (code, "GPUs 0,1 -> 0,2" in out) == (0, True)


def findings(document: str, name: str) -> list[dict[str, Any]]:
    return [finding for finding in json.loads(document)["findings"] if finding["name"] == name]


def test_the_doctor_calls_the_lost_one_lost_however_the_config_names_it(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([SOUND, LOST])
    for number, name in enumerate((1, uuid(1))):
        ill = setup(tmp_path / str(number), {"gpus.use": [0, name]})
        code, out, _ = asked(ill, nvml, "--doctor")
        assert code == 0
        (problem,) = findings(out, "gpus-lost")
        assert (problem["level"], problem["seen"]) == ("problem", f"GPU 1: {WHY}")
