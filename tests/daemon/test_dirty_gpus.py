"""GPUs that are not clean after a kill, on a simulated driver: who holds them, which are out, and how it goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from mgpu_llm.core.unusable import ADVICE
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, environ_of, fact, remains, until
from tests.support.daemons import processes_of
from tests.support.fake_nvml import FakeGpu, FakeNvml

HELD = 5_000_000_000
SETTINGS = {
    "gpus.use": [0, 1],
    "gpus.tensor_parallel": None,
    "patience.distributed_init": 600,
    "stop.kill_deadline": 0.5,
}
FREEZER = Path("/sys/fs/cgroup/freezer")
LEFT = "GPU 1 still holds 5.00 GB more than before the attempt although no process is left that uses it"


def in_attempt(life: Life, attempt: int) -> str:
    """The GPUs of that attempt's engine, once it is in the middle of its load."""
    life.wait_for(lambda status: status["attempt"] == attempt and status["phase"] == "distributed-init", LIMIT_S)
    return environ_of(life.status()["pid"])["CUDA_VISIBLE_DEVICES"]


def test_a_gpu_that_stays_dirty_is_told_once_and_a_spare_stands_in_for_the_rest_of_the_daemon_s_life(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 3)
    life = begin("hang-init", {**SETTINGS, "gpus.spares": [2]}, nvml.environment())
    assert in_attempt(life, 1) == "0,1"
    nvml.change(1, used_bytes=HELD)
    assert life.ctl("restart").returncode == 0
    assert in_attempt(life, 2) == "0,2"
    assert life.ctl("restart").returncode == 0
    assert in_attempt(life, 3) == "0,2"
    (said,) = life.told("gpu.out")
    assert (fact(said, "gpu"), fact(said, "why"), fact(said, "advice")) == ("1", LEFT, ADVICE)
    assert life.status()["gpus_out"] == [f"GPU 1 is out: {LEFT}; {ADVICE}"]
    assert life.told("engine.left") == []
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_without_other_gpus_that_suffice_it_stops_with_the_reason_and_no_loop(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    life = begin("hang-init", {**SETTINGS, "ladder.pin": ["gpus"]}, nvml.environment())
    in_attempt(life, 1)
    nvml.change(1, utilisation_percent=100)
    assert life.ctl("restart").returncode == 0
    assert life.ended() == 69
    assert life.story().count("engine.starting") == 1
    why = "GPU 1 must not be used any more: GPU 1 is still at 100 % although no process is left that uses it"
    assert f"gave up: {why}; no other GPUs suffice (another GPU: ladder.pin names" in life.log()
    assert remains(life.setup) == []


def test_memory_that_another_process_has_taken_meanwhile_is_told_with_its_name_and_puts_no_gpu_out(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 2)
    life = begin("hang-init", SETTINGS, nvml.environment())
    in_attempt(life, 1)
    nvml.change(1, used_bytes=HELD, processes=((os.getpid(), HELD),))
    assert life.ctl("restart").returncode == 0
    assert in_attempt(life, 2) == "0,1"
    (said,) = life.told("engine.left")
    assert f"GPU 1 still holds 5.00 GB more than before the attempt: pid {os.getpid()} (user " in fact(said, "what")
    (taken,) = life.told("gpus.taken")
    assert fact(taken, "what").startswith(f"GPU 1 holds 5.00 GB before the attempt: pid {os.getpid()} (user ")
    assert life.told("gpu.out") == []
    assert life.stop() == 0


def test_after_a_sigkill_of_engine_and_daemon_alike_the_next_life_removes_what_they_left(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    nvml.set([FakeGpu()])
    cache = tmp_path / "extensions" / "kernels"
    cache.mkdir(parents=True)
    environ = {**nvml.environment(), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    life = begin("", {**SETTINGS, "gpus.use": [0]}, environ)
    life.ready()
    ledger = life.setup.state_dir / "engine-files.json"
    files = life.setup.memory()
    assert files

    def written() -> bool:
        return ledger.exists() and all(file.name in ledger.read_text() for file in files)

    until("the files are written down", written, life.log)
    (cache / "lock").touch()
    life.process.send_signal(signal.SIGSTOP)  # so that it sees nothing of it
    for process in processes_of(life.setup.runtime_dir):
        os.kill(int(process.split()[0]), signal.SIGKILL)
    life.process.kill()
    life.process.wait()
    assert life.setup.memory() == files
    again = type(life)(life.setup, life.setup.folder / "log2", environ)
    try:
        again.ready()
        orphans = [fact(line, "what") for line in again.told("engine.orphan")]
        for file in files:
            assert f"removed '{file}', which an engine of an earlier run left" in orphans
        (lock,) = again.told("engine.stale-lock")
        assert fact(lock, "what").startswith(f"removed '{cache / 'lock'}': a compile that was killed left it")
    finally:
        assert again.stop() == 0
    assert remains(life.setup) == []
    assert not ledger.exists()


@pytest.mark.skipif(not os.access(FREEZER, os.W_OK), reason="needs the freezer of cgroup version 1")
def test_an_engine_that_sigkill_does_not_end_is_left_behind_with_its_gpu_and_a_spare_stands_in(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 3)
    life = begin("hang-init", {**SETTINGS, "gpus.spares": [2]}, nvml.environment())
    assert in_attempt(life, 1) == "0,1"
    worker = next(process for process in processes_of(life.setup.runtime_dir) if "Worker" in process)
    pid = worker.split()[0]
    nvml.change(1, used_bytes=HELD, processes=((int(pid), HELD),))
    freezer = FREEZER / f"mgpu-llm-dirty-{os.getpid()}"
    freezer.mkdir()
    try:
        (freezer / "cgroup.procs").write_text(pid)
        (freezer / "freezer.state").write_text("FROZEN")
        assert life.ctl("restart").returncode == 0
        assert in_attempt(life, 2) == "0,2"
        (said,) = life.told("gpu.out")
        assert fact(said, "gpu") == "1"
        assert re.fullmatch(
            rf"pid {pid} \(.*, state D\) cannot be ended: the kernel does not let it go", fact(said, "why")
        )
        assert life.stop() == 0
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        until("the freezer is empty", lambda: not (freezer / "cgroup.procs").read_text())
        freezer.rmdir()
