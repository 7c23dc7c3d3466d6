"""The GPUs at work, with real processes over a driver and a PyTorch that stand in for the real ones."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm import probing
from mgpu_llm.adapters.gpus import GpuReading, Gpus
from mgpu_llm.config import parse
from mgpu_llm.config.parse import Loaded
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport
from mgpu_llm.doctor import probe
from mgpu_llm.doctor.finding import Finding
from tests.doctor.test_examination import by_name, doctor
from tests.support.fake_nvml import FakeGpu, FakeNvml

FAKE_TORCH = Path(__file__).resolve().parents[1] / "support" / "fake_torch"
TWO = ("0", "1")
WORKS = Transport(name=AS_LAUNCHED, works=True, gib_per_s=255.0)
HANGS = Transport(name=AS_LAUNCHED, works=False, detail="hangs in all-reduce")
CURE = Transport(name="p2p-off", works=True, gib_per_s=25.6)


def config(folder: Path, *faults: dict[str, Any]) -> Path:
    """Of two GPUs and an engine whose Python has a vLLM by name, and a PyTorch with these faults."""
    (folder / "packages/vllm").mkdir(parents=True)
    (folder / "packages/vllm/__init__.py").write_text("")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(
        '{"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 4}'
    )
    file = folder / "mgpu-llm.toml"
    file.write_text(
        f'model.path = "{folder}/model"\ngpus.use = [0, 1]\ndaemon.runtime_dir = "{folder}/run"\n'
        f'daemon.state_dir = "{folder}/state"\n[engine]\npython = "{sys.executable}"\nport = 18232\n'
        f"env.FAKE_TORCH = {json.dumps(json.dumps(faults))}\n"
        f'env.PYTHONPATH = "{FAKE_TORCH}:{folder}/packages"\n'
    )
    return file


def test_gpus_that_somebody_uses_are_left_alone_until_forced(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu(processes=((1, 20 << 30),), used_bytes=20 << 30)])
    file = str(config(tmp_path))
    told = by_name(doctor("--config", file, "--probe", environ=nvml.environment()))[probe.NAME]
    assert (told["level"], "GPU 1 (20 GiB taken)" in told["seen"]) == ("unknown", True)
    forced = by_name(doctor("--config", file, "--probe", "--force", environ=nvml.environment()))[probe.NAME]
    assert (forced["level"], "as-launched: works" in forced["seen"]) == ("ok", True)


def test_gpus_that_hand_over_wrong_data_are_a_problem_and_the_cure_is_told(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    wrong = {"at": "all_reduce", "do": "wrong", "gpu": 0, "unless": {"NCCL_P2P_DISABLE": "1"}}
    told = by_name(doctor("--config", str(config(tmp_path, wrong)), "--probe", environ=nvml.environment()))[probe.NAME]
    assert told["level"] == "problem"
    assert "do not reach each other" in told["seen"]
    assert "p2p-off works" in told["fix"]


def test_the_gpus_are_probed_that_are_left_to_a_start_or_none_where_they_do_not_suffice(
    tmp_path: Path, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu(lost=True), FakeGpu()])
    file = config(tmp_path)
    told = by_name(doctor("--config", str(file), "--probe", environ=nvml.environment()))[probe.NAME]
    assert (told["level"], told["seen"].startswith("GPU 1")) == ("ok", True), told
    file.write_text(f'ladder.pin = ["gpus"]\n{file.read_text()}')
    told = by_name(doctor("--config", str(file), "--probe", environ=nvml.environment()))[probe.NAME]
    assert (told["level"], "no other GPUs suffice" in told["seen"]) == ("unknown", True)


def test_without_a_config_that_is_right_nothing_is_probed(tmp_path: Path) -> None:
    async def probed(loaded: Loaded | None) -> Finding:
        (found,) = await probing.probed(loaded, Gpus(), {}, force=False)
        return found

    for loaded, why in ((None, "without a config"), (parse.load(tmp_path / "none.toml"), "must be right first")):
        told = asyncio.run(probed(loaded))
        assert (told.level, why in told.seen) == ("unknown", True)


@pytest.mark.parametrize(
    ("checked", "level", "word"),
    [
        (Checked(transports=(WORKS,), took_s=7.2), "ok", "as-launched: works, 255 GiB/s in all-reduce (7 s)"),
        (Checked(transports=(HANGS, CURE)), "problem", "p2p-off works"),
        (Checked(gpus={"1": "CUDA error"}, transports=()), "problem", "GPU 1 cannot compute: CUDA error"),
        (Checked(pairs={("0", "1"): "wrong data"}, transports=(WORKS,)), "problem", "wrong data"),
        (Checked(unobserved="no time was left"), "unknown", "no time was left"),
        (Checked(transports=(Transport(name=AS_LAUNCHED, detail="ended early"),)), "unknown", "ended early"),
        (Checked(), "unknown", "told nothing"),
    ],
)
def test_what_was_found_out_is_judged_as_the_daemon_would(checked: Checked, level: str, word: str) -> None:
    (told,) = probe.findings(checked, TWO)
    assert (told.level, word in told.seen) == (level, True)
    assert (told.fix != "") is (level == "problem")


def test_one_gpu_has_no_transport_to_be_told_of() -> None:
    (told,) = probe.findings(Checked(took_s=3.0), ("0",))
    assert (told.level, told.seen) == ("ok", "GPU 0 computes (3 s)")


def test_memory_that_nobody_is_named_for_is_use_too() -> None:
    def reading(used: int) -> GpuReading:
        return GpuReading(
            uuid="GPU-0",
            index=0,
            memory_used_bytes=used,
            memory_total_bytes=80 << 30,
            utilisation_percent=0,
            power_mw=None,
            processes=None,
        )

    assert probe.busy([reading(500 << 20)]) is None
    assert probe.busy([reading(2 << 30)]) is not None
