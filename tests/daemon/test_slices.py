"""An engine on a MIG slice, on a simulated driver: what it gets, what is read and reserved, and what stands in its way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, environ_of, remains
from tests.support.daemons import MGPUD
from tests.support.fake_engine import COMMAND
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid

ONE, TWO = "MIG-377e0049-554c-540b-93c6-d0976f8426cb", "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27"
GIB = 2**30
SLICED = FakeGpu(slices=((ONE, 40 * GIB), (TWO, 20 * GIB)), slice_used_bytes=3 * GIB, used_bytes=9 * GIB)


def check(life: Life, nvml: FakeNvml) -> tuple[int, str]:
    command = [str(MGPUD), "--config", str(life.setup.config_file), "--check"]
    environ = {**os.environ, **nvml.environment()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environ)
    return done.returncode, done.stderr


def test_an_engine_on_a_slice_gets_its_name_and_the_slice_is_read_reserved_and_marked(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([FakeGpu(), SLICED])
    common: dict[str, object] = {"gpus.lock_dirs": [str(tmp_path)], "gpus.tensor_parallel": None}
    life = begin(settings={**common, "gpus.use": [ONE[:8]]}, environ=nvml.environment())
    status = life.ready()
    environ = environ_of(status["pid"])
    assert (environ["CUDA_VISIBLE_DEVICES"], environ["CUDA_DEVICE_ORDER"]) == (ONE, "PCI_BUS_ID")
    (read,) = status["gpus"]
    assert (read["uuid"], read["used_bytes"], read["total_bytes"]) == (ONE, 3 * GIB, 40 * GIB)
    document = json.loads(life.ctl("gpus", "--json").stdout)
    assert [gpu["in_use"] for gpu in document["gpus"]] == [False, True]
    assert [part["in_use"] for part in document["gpus"][1]["mig_slices"]] == [True, False]
    assert document["missing"] == []
    assert f"MIG is on: *{ONE} (40.0 GiB), {TWO} (20.0 GiB)" in " ".join(life.ctl("gpus").stdout.split())
    assert check(life, nvml) == (
        0,
        f"remark: GPU {ONE} is reserved by the mgpud of this config (pid {life.process.pid})\n",
    )
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_slices_of_a_gpu_serve_side_by_side_and_keep_out_who_wants_one_of_them_or_all_of_it(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([FakeGpu(), SLICED])
    common: dict[str, object] = {"gpus.lock_dirs": [str(tmp_path)], "gpus.tensor_parallel": None}
    first, second = (begin(settings={**common, "gpus.use": [part]}, environ=nvml.environment()) for part in (ONE, TWO))
    assert (first.ready()["rung"], second.ready()["rung"]) == ("base", "base")
    whole = begin(settings={**common, "gpus.use": [1]}, environ=nvml.environment())
    assert whole.ended() == 75
    # Not at once: for a moment it has a part of GPU 1, until it finds that its slice is taken.
    again = begin(settings={**common, "gpus.use": [ONE]}, environ=nvml.environment())
    assert again.ended() == 75
    assert f"cannot reserve GPU 1 ({uuid(1)}): 2 other mgpud use it: (pid " in whole.log()
    assert f"cannot reserve GPU {ONE} ({ONE}): another mgpud uses it (pid {first.process.pid}, " in again.log()
    assert first.stop() == second.stop() == 0


def test_a_gpu_that_is_held_whole_is_not_divided_even_where_it_is_shared(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([SLICED])
    common: dict[str, object] = {"gpus.lock_dirs": [str(tmp_path)], "gpus.tensor_parallel": None}
    whole = begin(settings={**common, "gpus.use": [0], "gpus.shared": True}, environ=nvml.environment())
    whole.ready()
    alone = begin(settings={**common, "gpus.use": [TWO]}, environ=nvml.environment())
    assert alone.ended() == 75
    assert f"cannot reserve GPU {TWO} ({TWO}): another mgpud uses it (pid {whole.process.pid}, " in alone.log()
    assert "set gpus.shared = true here, as it is there" in alone.log()
    assert whole.stop() == 0


def test_a_slice_for_a_vllm_that_cannot_take_its_name_is_a_problem_of_the_config(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([SLICED])
    site = tmp_path / "site"
    (site / "vllm-0.23.0.dist-info").mkdir(parents=True)
    (site / "vllm-0.23.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.23.0\n")
    settings: dict[str, object] = {
        "gpus.use": [ONE],
        "gpus.tensor_parallel": None,
        "engine.command": [sys.executable, *COMMAND[1:], "serve"],
        "engine.env.PYTHONPATH": str(site),
    }
    life = begin(settings=settings, environ=nvml.environment())
    assert life.ended() == 78
    said = "gpus.use: found a MIG slice for vLLM 0.23.0, expected vLLM 0.24 or later, which understands UUIDs"
    assert said in life.log()
    status, told = check(life, nvml)
    assert (status, said in told) == (78, True)
