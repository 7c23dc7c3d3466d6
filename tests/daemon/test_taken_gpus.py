"""GPUs of which others hold so much that vLLM would end at once, on a simulated driver: no load is made for that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, fact, remains
from tests.support.fake_engine import COMMAND
from tests.support.fake_nvml import FakeGpu, FakeNvml

GIB = 1 << 30
FREE = FakeGpu(total_bytes=80 * GIB)
TAKEN = FakeGpu(total_bytes=80 * GIB, used_bytes=28 * GIB, processes=((os.getpid(), 28 * GIB),))


def settings(folder: Path, vllm: str = "0.26.0") -> dict[str, object]:
    """Of a daemon whose engine is that version of vLLM."""
    told = folder / f"site/vllm-{vllm}.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}\n")
    return {
        "gpus.use": [0, 1],
        "gpus.tensor_parallel": None,
        "engine.command": [sys.executable, *COMMAND[1:], "serve"],
        "engine.env.PYTHONPATH": str(told.parent),
    }


def test_no_load_is_made_on_a_gpu_that_somebody_holds_and_the_free_one_serves(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([FREE, TAKEN])
    life = begin(settings={**settings(tmp_path), "retries.backoff": 0.1}, environ=nvml.environment())
    status = life.ready()
    assert status["rung"] == "tp-1"
    assert [(one["outcome"], one["cause"]) for one in status["attempts"][:-1]] == [("averted", "gpu-not-free")] * 5
    assert len(life.told("engine.command")) == 1
    assert list((life.setup.state_dir / "incidents").glob("*")) == [], "nothing has failed"
    said, *_ = life.told("engine.averted")
    held = f"GPU 1 has 52.00 of 80.00 GiB free, and utilisation 0.9 asks for more: pid {os.getpid()} (user "
    assert fact(said, "summary").startswith(held)
    assert fact(said, "next") == "try again on rung base after 0.1 s"
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_once_it_is_free_again_it_loads_as_it_should(begin: Begin, nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.set([FREE, TAKEN])
    life = begin(settings=settings(tmp_path), environ=nvml.environment())
    life.wait_for(lambda status: status["state"] == "backoff", LIMIT_S)
    nvml.set([FREE, FREE])
    assert life.ready()["rung"] == "base"
    assert life.stop() == 0


def test_a_vllm_that_does_not_compare_is_left_to_load(begin: Begin, nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.set([FREE, TAKEN])
    life = begin(settings=settings(tmp_path, "0.10.2"), environ=nvml.environment())
    assert life.ready()["rung"] == "base"
    assert len(life.told("gpus.taken")) == 1
    assert life.stop() == 0
