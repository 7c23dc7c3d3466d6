"""What is remembered beside a rung that served: all that it depends on, as far as this host tells it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm import host
from mgpu_llm.config.parse import load
from tests.adapters.test_engine_versions import installed
from tests.daemon.conftest import Begin
from tests.daemon.lives import Life, fact, living
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid
from tests.support.fake_setup import FakeSetup

BROKEN = "hang-init unless NCCL_P2P_DISABLE=1"
SHORT: Mapping[str, object] = {"patience.distributed_init": 2}


def remembered(life: Life) -> dict[str, Any]:
    """As it is on the disk once the life is over."""
    assert life.ready()["rung"] == "p2p-off"
    life.process.terminate()
    assert life.ended() == 0
    found: dict[str, Any] = json.loads((life.setup.state_dir / "known-good.json").read_text())
    return found


def test_on_gpus_it_is_the_model_the_gpus_and_every_version(begin: Begin, nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.set([FakeGpu()] * 4)
    site = installed(tmp_path / "site", "vllm 0.32.0", "torch 2.11.0+cu130", "nvidia-nccl-cu13 2.28.9")["PYTHONPATH"]
    gpus = {"gpus.use": [3, 2], "gpus.spares": [0], "gpus.tensor_parallel": None, "engine.env.PYTHONPATH": site}
    life = begin(BROKEN, {**SHORT, **gpus}, nvml.environment())
    found = remembered(life)
    settings = found["key"].pop("settings")
    assert re.fullmatch(r"[0-9a-f]{16}", settings)
    assert re.fullmatch(r"\d+\.\d+(\.\d+)*", found["key"].pop("driver"))
    assert found["key"] == {
        "model": str(life.setup.model),
        "model size": "",
        "model config": hashlib.sha256((life.setup.model / "config.json").read_bytes()).hexdigest(),
        "GPUs": f"{uuid(3)}, {uuid(2)}, {uuid(0)}",
        "vLLM": "0.32.0",
        "NCCL": "2.28.9",
    }
    assert found["boot"] == host.BOOT_ID.read_text().strip()


def test_another_vllm_is_told_as_that_and_as_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed(site, "vllm 0.32.0")
    setup = FakeSetup(folder=tmp_path, scenario=BROKEN, settings={**SHORT, "engine.env.PYTHONPATH": str(site)})
    with living(setup, log="first") as life:
        assert (remembered(life)["key"]["vLLM"], remembered_driver(setup)) == ("0.32.0", "")
    (site / "vllm-0.32.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    with living(setup, log="second") as life:
        life.ready()
        (told,) = life.told("rung.forgotten")
        assert fact(told, "changed") == "vLLM 0.32.0 -> 0.33.0"


def remembered_driver(setup: FakeSetup) -> str:
    """Of an engine without GPUs nobody asks."""
    return str(json.loads((setup.state_dir / "known-good.json").read_text())["key"]["driver"])


def test_what_nobody_tells_is_empty_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BOOT_ID", tmp_path / "boot_id")
    found = asyncio.run(host.find_versions(None, ("/nowhere/vllm", "serve"), {}))
    assert found == host.Versions()


def test_a_command_that_is_stuck_is_waited_for_no_longer_than_it_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ENGINE_S", 0.2)
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexec sleep 3\n")
    python.chmod(0o755)
    assert asyncio.run(host.find_versions(None, (str(python),), {"PATH": "/usr/bin:/bin"})).vllm == ""


def test_gpus_as_they_are_written_are_their_own_names(tmp_path: Path) -> None:
    def written(**gpus: object) -> host.Found | None:
        settings = {f"gpus.{name}": value for name, value in gpus.items()}
        return host.as_written(load(FakeSetup(folder=tmp_path, settings=settings).write()).config)

    assert written(use="all") is None
    assert written(use="none") == host.Found()
    assert written(use=[1, "GPU-5e0c"], spares=[4]) == host.Found(
        uuids={"1": "1", "GPU-5e0c": "GPU-5e0c"}, spares={"4": "4"}
    )
