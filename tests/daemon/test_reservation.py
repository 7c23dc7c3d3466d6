"""GPUs that are reserved: what becomes of a second mgpud that wants them, on a simulated driver."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, remains
from tests.support.daemons import MGPUD
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid
from tests.support.fake_setup import FakeSetup


@pytest.fixture
def locks(tmp_path: Path) -> dict[str, object]:
    folder = tmp_path / "locks"
    folder.mkdir()
    return {"gpus.lock_dirs": [str(folder)], "gpus.tensor_parallel": None}


def check(life: Life, nvml: FakeNvml) -> tuple[int, list[str]]:
    return checked(life.setup, nvml)


def checked(setup: FakeSetup, nvml: FakeNvml) -> tuple[int, list[str]]:
    """The exit status and the remarks of a --check of this config."""
    command = [str(MGPUD), "--config", str(setup.config_file), "--check"]
    environ = {**os.environ, **nvml.environment()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environ)
    return done.returncode, done.stderr.splitlines()


def test_a_second_instance_gets_no_gpu_of_the_first_not_even_a_spare_and_the_first_is_named(
    begin: Begin, nvml: FakeNvml, locks: dict[str, object]
) -> None:
    nvml.set([FakeGpu()] * 4)
    first = begin(settings={**locks, "gpus.use": [0, 1], "gpus.spares": [2]}, environ=nvml.environment())
    first.ready()
    beside = begin(settings={**locks, "gpus.use": [3]}, environ=nvml.environment())
    second = begin(settings={**locks, "gpus.use": [2, 3]}, environ=nvml.environment())
    assert second.ended() == 75
    assert beside.ready()["rung"] == "base"
    assert f"cannot reserve GPU 2 ({uuid(2)}): another mgpud uses it (pid {first.process.pid}, user " in second.log()
    assert f"config '{first.setup.config_file}', runtime folder '{first.setup.runtime_dir}')" in second.log()
    assert "name other GPUs in gpus.use or gpus.spares, or set gpus.shared = true in both configs" in second.log()
    assert second.told("engine.starting") == []
    pid = first.process.pid
    # A check tells who holds them, and does not mind its own instance.
    own = [f"remark: GPU {number} is reserved by the mgpud of this config (pid {pid})" for number in (0, 1, 2)]
    assert check(first, nvml) == (0, own)
    status, said = check(second, nvml)
    assert status == 0
    assert len([line for line in said if "another mgpud uses it" in line]) == 2
    assert any(line.startswith(f"remark: GPU 2: another mgpud uses it (pid {pid}, user ") for line in said)
    assert all(line.endswith("; until that ends, mgpud ends with exit status 75") for line in said if "GPU" in line)
    for one in (first, beside):
        assert one.stop() == 0
        assert remains(one.setup) == []


def test_gpus_are_shared_where_both_say_so_and_not_where_one_does(
    begin: Begin, nvml: FakeNvml, locks: dict[str, object]
) -> None:
    nvml.set([FakeGpu()] * 2)
    shared = {**locks, "gpus.use": [0], "gpus.shared": True}
    one, other = (begin(settings=shared, environ=nvml.environment()) for _ in range(2))
    assert (one.ready()["state"], other.ready()["state"]) == ("ready", "ready")
    alone = begin(settings={**shared, "gpus.shared": False}, environ=nvml.environment())
    assert alone.ended() == 75
    assert "2 other mgpud use it: (pid " in alone.log()
    assert "set gpus.shared = true here, as it is there" in alone.log()
    assert one.stop() == other.stop() == 0


def test_a_hostile_lock_file_is_named_with_what_to_do_and_a_missing_folder_only_told(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([FakeGpu()] * 2)
    folder = tmp_path / "locks"
    folder.mkdir()
    (folder / f"mgpu-llm-{uuid(0)}.lock").mkdir()
    whole = {"gpus.tensor_parallel": None}
    spoilt = begin(settings={**whole, "gpus.lock_dirs": [str(folder)], "gpus.use": [0]}, environ=nvml.environment())
    missing = begin(
        settings={**whole, "gpus.lock_dirs": [str(tmp_path / "no")], "gpus.use": [1]},
        environ=nvml.environment(),
    )
    assert spoilt.ended() == 75
    assert f"cannot reserve GPU 0 ({uuid(0)}): '{folder}/mgpu-llm-{uuid(0)}.lock' is no lock file" in spoilt.log()
    missing.wait_log("gpus.locks-unusable")
    missing.wait_log("engine.starting")
    (told,) = missing.told("gpus.locks-unusable")
    assert "GPUs are not reserved: other instances may take them; set gpus.lock_dirs" in told
    assert missing.stop() == 0


def test_a_check_says_that_gpus_cannot_be_reserved(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.set([FakeGpu()] * 2)
    folders = [str(tmp_path / "no"), str(tmp_path / "file")]
    (tmp_path / "file").touch()
    settings = {"gpus.use": [0], "gpus.tensor_parallel": None, "gpus.lock_dirs": folders}
    setup = FakeSetup(folder=tmp_path, settings=settings)
    setup.write()
    status, told = checked(setup, nvml)
    why = f"'{folders[0]}': no such folder; '{folders[1]}': no such folder"
    assert status == 0
    assert f"remark: GPUs cannot be reserved, and other instances may take them ({why}); set gpus.lock_dirs" in told
