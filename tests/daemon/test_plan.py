"""mgpud --plan: what would be tried, from a config and what the driver says, with nothing started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S
from tests.support.checkpoints import QWEN_7B, write_model
from tests.support.daemons import MGPUD
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid
from tests.support.fake_setup import FakeSetup

ON_GPUS: Mapping[str, object] = {"gpus.use": [0, 1], "gpus.tensor_parallel": None}
EVERY = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
#: Where nobody can ask a driver, whatever this machine has.
NO_DRIVER = {"LD_LIBRARY_PATH": "/nowhere", "FAKE_NVML_CONTROL": "/nowhere"}


def asked(
    setup: FakeSetup, cause: str = "unknown", environ: Mapping[str, str] | None = None, *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MGPUD, "--config", setup.write(), "--plan", cause, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        env={**os.environ, **(environ or {})},
    )


def plans(setup: FakeSetup, cause: str = "unknown", environ: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    done = asked(setup, cause, environ)
    remarks = [line for line in done.stderr.splitlines() if not line.startswith("remark: planned without the NVIDIA")]
    assert (done.returncode, remarks) == (0, [])
    document = json.loads(done.stdout)
    assert set(document) == {"cause", "plans"}
    assert document["cause"] == cause
    found: list[dict[str, Any]] = document["plans"]
    return found


def names(plan: Mapping[str, Any]) -> list[str]:
    return [rung["name"] for rung in plan["rungs"]]


def on_gpus(folder: Path, nvml: FakeNvml, more: Mapping[str, object], cause: str = "unknown") -> list[dict[str, Any]]:
    return plans(FakeSetup(folder=folder, settings={**ON_GPUS, **more}), cause, nvml.environment())


def linked(nvml: FakeNvml, pairs: Iterable[tuple[int, int]]) -> None:
    nvml.set([FakeGpu()] * 4, nvlinks=list(pairs))


def test_each_rung_comes_with_its_changes_cost_command_line_and_variables(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    more = {"engine.args": ["--api-key", "s3cret"], "engine.env.HF_TOKEN": "s3cret", "engine.env.A": "1"}
    (plan,) = on_gpus(tmp_path, nvml, more)
    assert "s3cret" not in json.dumps(plan)
    assert (plan["cause"], plan["wants"], plan["status"], plan["outs"]) == (
        "unknown",
        ["transport", "memory-lower", "fewer-gpus"],
        69,
        [],
    )
    assert names(plan) == [
        "base",
        "p2p-off",
        "p2p-off+utilisation-0.85",
        "p2p-off+utilisation-0.80",
        "p2p-off+utilisation-0.80+tp-1",
    ]
    base, p2p, *_, last = plan["rungs"]
    assert (base["tries"], base["changes"], base["cost"]) == (1, [], "")
    assert base["argv"][-2:] == ["--api-key", "..."]
    assert base["argv"][base["argv"].index("--tensor-parallel-size") + 1] == "2"
    told = {name: base["env"][name] for name in ("A", "HF_TOKEN", "CUDA_VISIBLE_DEVICES")}
    assert told == {"A": "1", "HF_TOKEN": "...", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert p2p["changes"] == ["NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce"]
    assert p2p["cost"].startswith("GPUs talk through host memory")
    assert (p2p["env"], p2p["argv"]) == (
        {"NCCL_P2P_DISABLE": "1"},
        [*base["argv"], "--disable-custom-all-reduce"],
    )
    assert last["env"] == {"NCCL_P2P_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "0"}
    assert last["argv"][last["argv"].index("--gpu-memory-utilization") + 1] == "0.8"


@pytest.mark.parametrize(
    ("pairs", "rungs"),
    [
        (EVERY, ["base", "nvlink-gentle", "nvlink-gentle+p2p-off"]),
        (EVERY[:1], ["base", "p2p-nvlink-only", "p2p-nvlink-only+p2p-off"]),
        ([], ["base", "p2p-off"]),
    ],
    ids=["all", "some", "none"],
)
def test_the_transports_follow_the_nvlink_that_the_driver_tells_of(
    tmp_path: Path, nvml: FakeNvml, pairs: list[tuple[int, int]], rungs: list[str]
) -> None:
    linked(nvml, pairs)
    pinned = {"gpus.use": [0, 1, 2, 3], "ladder.pin": ["utilisation", "gpus"]}
    (plan,) = on_gpus(tmp_path, nvml, pinned)
    assert names(plan) == rungs
    assert [(out["what"], out["why"], out["forbidden"]) for out in plan["outs"]] == [
        ("less memory utilisation", 'ladder.pin names "utilisation"', True),
        ("fewer GPUs", 'ladder.pin names "gpus"', True),
    ]


def test_where_no_check_tells_what_helps_nvlink_is_not_spared_for_one_load_more(tmp_path: Path, nvml: FakeNvml) -> None:
    linked(nvml, EVERY)
    pinned = {"gpus.use": [0, 1, 2, 3], "ladder.pin": ["utilisation", "gpus"]}
    for mode, first in (("off", "p2p-off"), ("before", "nvlink-gentle"), ("overlap", "nvlink-gentle")):
        (plan,) = on_gpus(tmp_path / mode, nvml, {**pinned, "preflight.mode": mode})
        assert names(plan)[:2] == ["base", first]


def test_a_driver_that_does_not_tell_of_nvlink_counts_as_one_without(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2, ["nvmlDeviceGetP2PStatus error 3"], nvlinks=[(0, 1)])
    (plan,) = on_gpus(tmp_path, nvml, {"ladder.pin": ["utilisation", "gpus"]})
    assert names(plan) == ["base", "p2p-off"]


def test_fewer_gpus_must_hold_the_weights(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(total_bytes=14_000_000_000)] * 2)
    model = write_model(tmp_path / "weighed", QWEN_7B)
    more: dict[str, object] = {"model.path": str(model), "ladder.pin": ["utilisation"]}
    (plan,) = on_gpus(tmp_path, nvml, more)
    assert names(plan) == ["base", "p2p-off"]
    assert "1 GPU does not hold 14.2 GiB of weights at utilisation 0.9" in [out["why"] for out in plan["outs"]]
    more["engine.args"] = ["--quantization", "fp8"]
    assert names(on_gpus(tmp_path, nvml, more)[0]) == ["base", "p2p-off", "p2p-off+tp-1"]


def test_a_spare_stands_in_for_a_gpu_that_is_lost(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 4)
    tried = names(on_gpus(tmp_path, nvml, {"gpus.spares": [uuid(3)]}, "gpu-lost")[0])
    assert [name for name in tried if "3" in name]


def test_a_spare_that_is_in_use_already_by_another_name_is_refused(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    setup = FakeSetup(folder=tmp_path, settings={**ON_GPUS, "gpus.spares": [uuid(1)]})
    done = asked(setup, "unknown", nvml.environment())
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f'{setup.config_file}: gpus.spares: GPU 1 is named 2 times (1 and "{uuid(1)}")\n'


def test_what_clients_see_is_in_it_only_where_it_is_released(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    more: dict[str, object] = {"engine.args": ["--max-model-len", "8k"]}
    told = on_gpus(tmp_path, nvml, more, "no-kv-memory")
    assert ("a shorter context", True) in [(out["what"], out["forbidden"]) for plan in told for out in plan["outs"]]
    more["ladder.may_change"] = ["context-length"]
    told = on_gpus(tmp_path, nvml, more, "no-kv-memory")
    assert any("context-3840" in name for plan in told for name in names(plan))


def test_without_a_driver_the_gpus_are_those_of_the_config_and_only_all_of_them_is_refused(tmp_path: Path) -> None:
    (plan,) = plans(FakeSetup(folder=tmp_path, settings={**ON_GPUS, "gpus.spares": [7]}), environ=NO_DRIVER)
    assert names(plan)[-1] == "p2p-off+utilisation-0.80+tp-1"
    assert plan["rungs"][0]["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    made = asked(FakeSetup(folder=tmp_path, settings=ON_GPUS), "unknown", NO_DRIVER)
    assert made.stderr.startswith("remark: planned without the NVIDIA driver: which GPUs NVLink joins")
    done = asked(FakeSetup(folder=tmp_path, settings={**ON_GPUS, "gpus.use": "all"}), "unknown", NO_DRIVER)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.endswith("(to plan without the driver, write the indices of the GPUs into gpus.use)\n")


def test_neither_an_engine_nor_its_port_nor_a_gpu_is_needed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        setup = FakeSetup(folder=tmp_path, port=port, settings={"engine.command": ["/nowhere/vllm", "serve"]})
        (plan,) = plans(setup)
    assert plan["rungs"][0]["argv"][:2] == ["/nowhere/vllm", "serve"]
    assert names(plan) == ["base", "p2p-off", "p2p-off+tp-1"]
    assert not setup.runtime_dir.exists()


def test_own_rungs_and_none_at_all_are_told_too(tmp_path: Path) -> None:
    own = '[[ladder.rungs]]\nname = "a"\nargs = ["-x"]\n[[ladder.rungs]]\nname = "b"\ngpus = 1\n'
    (plan,) = plans(FakeSetup(folder=tmp_path, tables=own))
    assert names(plan) == ["base", "a", "a+b"]
    (plan,) = plans(FakeSetup(folder=tmp_path, settings={"ladder.rungs": []}))
    assert names(plan) == ["base"]


def test_a_daemon_that_runs_is_not_disturbed(begin: Begin) -> None:
    life = begin()
    pid = life.ready()["pid"]
    plans(life.setup)
    assert life.status()["pid"] == pid
    assert life.stop() == 0


def test_a_cause_that_there_is_not_is_a_wrong_command_with_a_hint(tmp_path: Path) -> None:
    done = asked(FakeSetup(folder=tmp_path), "nccl-p3p")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'cannot plan: there is no cause "nccl-p3p"; did you mean "nccl-p2p"?\n'
    done = asked(FakeSetup(folder=tmp_path), "xyz")
    assert (done.returncode, done.stderr) == (2, 'cannot plan: there is no cause "xyz"\n')


def test_a_plan_and_a_check_are_not_asked_at_once(tmp_path: Path) -> None:
    done = asked(FakeSetup(folder=tmp_path), "unknown", None, "--check")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--check, --plan, --doctor and --gpus are several questions" in done.stderr


def test_a_wrong_config_is_told_as_a_check_tells_it(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path, settings={"stop.grce": 1})
    done = asked(setup)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"{setup.config_file}: stop.grce: found an unknown key")
