"""A model that does not fit, or is not whole, as mgpud says it before anything starts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.daemon.lives import LIMIT_S
from tests.support.checkpoints import QWEN_72B, write_model
from tests.support.daemons import MGPUD
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_setup import FakeSetup

GIB = 1 << 30


def said(folder: Path, nvml: FakeNvml, more: Mapping[str, object], *arguments: str) -> tuple[int, str, str]:
    settings = {"gpus.use": [0, 1], "gpus.tensor_parallel": None, "model.path": str(folder / "model"), **more}
    setup = FakeSetup(folder=folder, settings=settings)
    config = setup.write()
    setup.state_dir.mkdir(exist_ok=True)
    write_model(folder / "model", QWEN_72B, shards=4)
    done = subprocess.run(
        [MGPUD, "--config", config, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **nvml.environment()},
    )
    return done.returncode, done.stdout, done.stderr.replace(str(setup.config_file), "FILE")


def test_what_does_not_fit_is_a_wrong_config_for_the_check_the_plan_and_the_daemon(
    tmp_path: Path, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 2)
    one = {"gpus.use": [0]}
    refused = (
        "FILE: gpus.use: the model does not fit: it needs at least 135.4 GiB of weights and 10.0 GiB of cache for "
        "32768 tokens on its one GPU, and 0.9 of 140.4 GiB is 126.4 GiB; use 2 GPUs (gpus.use, gpus.tensor_parallel = 2)\n"
    )
    for arguments in (("--check",), ("--plan", "unknown"), ()):
        code, out, err = said(tmp_path, nvml, one, *arguments)
        assert (code, out) == (78, "")
        assert refused.strip() in err


def test_the_check_prints_the_estimate_and_what_others_hold(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu(used_bytes=30 * GIB)])
    code, out, err = said(tmp_path, nvml, {}, "--check")
    assert code == 0
    assert "  about 67.7 GiB of weights on each of its 2 GPUs (135.4 GiB in 4 files; " in out
    assert "one request of 32768 needs 5.0 GiB\n" in out
    assert (
        "remark: others hold 30.0 GiB of GPU 1: 109.6 GiB are free, and vLLM does not start with less than 125.6 GiB"
        in err
    )


def test_a_half_of_a_download_is_a_wrong_config(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    said(tmp_path, nvml, {}, "--check")
    setup = FakeSetup(folder=tmp_path, settings={"gpus.use": "none"})
    (tmp_path / "model" / "model-00003-of-00004.safetensors").unlink()
    done = subprocess.run(
        [MGPUD, "--config", setup.write(), "--check"], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 78
    assert 'model-00003-of-00004.safetensors": it is not there; fetch the model anew' in done.stderr
