"""Evidence costs nothing else: not on a full disk, not when the daemon dies over it, not when somebody wants a stop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.daemon.conftest import Begin
from tests.daemon.evidence import careless_settings, folder_of, incidents, told
from tests.daemon.lives import LIMIT_S, environ_of, fact, living, remains, until
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_setup import FakeSetup
from tests.support.small_disk import small_disk

STALL = {"patience.distributed_init": 2}
STALLS_ONCE = "hang-init unless NCCL_P2P_DISABLE=1"


def slow_nvidia_smi(folder: Path) -> dict[str, str]:
    """An environment in which nvidia-smi tells that it was asked, and then nothing any more."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $$ >{folder}/asked\nexec sleep 3600\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_on_a_full_disk_there_is_one_warning_and_the_next_attempt(begin: Begin, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        settings = {**STALL, "daemon.state_dir": str(disk.folder), "records.keep": 0}
        life = begin(STALLS_ONCE, settings)
        life.wait_log("engine.phase phase=distributed-init")
        disk.fill()
        status = life.ready()
        assert [attempt["incident"] for attempt in status["attempts"]] == ["", ""]
        (warned,) = life.told("incident.failed")
        assert "no space left on device" in warned
        assert not any(disk.folder.glob("incidents/*"))
        assert life.stop() == 0


def test_a_read_only_disk_costs_the_evidence_alone(begin: Begin, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        life = begin(STALLS_ONCE, {**STALL, "daemon.state_dir": str(disk.folder), "records.keep": 0})
        life.wait_log("engine.phase phase=distributed-init")
        disk.read_only()
        life.ready()
        (warned,) = life.told("incident.failed")
        assert "read-only file system" in warned
        assert life.stop() == 0


def test_a_daemon_killed_while_it_gathers_leaves_nothing_half_done_and_the_next_one_serves(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path / "life", scenario="hang-init", settings=STALL)
    setup.folder.mkdir()
    place = tmp_path / "bin"
    with living(setup, slow_nvidia_smi(place), log="first") as first:
        until("nvidia-smi is asked", (place / "asked").exists, first.log)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        assert incidents(first) == []
        half = folder_of(first) / ".new-20261124T210500Z-a1-stalled-in-weights"
        half.mkdir(parents=True)
        (half / "engine.log").write_text("half")
        strange = folder_of(first) / ".new-nobody-knows"
        strange.mkdir()
        # The engine that it has left is the next one's to end.
        (place / "nvidia-smi").unlink()
        cured = FakeSetup(folder=setup.folder, port=setup.port, settings=STALL)
        with living(cured, log="second") as second:
            second.ready()
            assert incidents(second) == [strange]
            assert second.stop() == 0
            assert remains(cured) == []


def test_a_stop_does_not_wait_for_evidence(begin: Begin, tmp_path: Path) -> None:
    life = begin("hang-init", STALL, slow_nvidia_smi(tmp_path / "bin"))
    until("nvidia-smi is asked", (tmp_path / "bin" / "asked").exists, life.log)
    assert life.ctl("stop", "--wait").returncode == 0
    assert incidents(life) == []
    assert life.status()["attempts"][0]["incident"] == ""
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_program_that_does_not_answer_is_named_and_the_rest_is_kept(begin: Begin, tmp_path: Path) -> None:
    life = begin(STALLS_ONCE, STALL, slow_nvidia_smi(tmp_path / "bin"))
    life.ready()
    (folder,) = incidents(life)
    assert told(folder)["not_observed"]["topology.txt"] == "nvidia-smi has not answered within 4 s"
    assert (folder / "stacks.txt").exists()
    assert life.stop() == 0


def test_with_gpus_their_state_their_holders_and_the_driver_are_kept_and_the_next_attempt_lets_nccl_talk(
    begin: Begin, nvml: FakeNvml, tmp_path: Path
) -> None:
    busy = FakeGpu(used_bytes=5 << 30, utilisation_percent=100, processes=((os.getpid(), 4 << 30),))
    nvml.set([busy, FakeGpu(), FakeGpu(lost=True)])
    settings = {**STALL, **careless_settings(tmp_path / "careless"), "gpus.use": [0, 1], "gpus.tensor_parallel": None}
    life = begin("hang-init unless tp<=1", settings, nvml.environment())
    life.wait_for(lambda status: status["attempt"] == 2 and status["pid"] is not None, LIMIT_S)
    environ = environ_of(life.status()["pid"])
    assert (environ["NCCL_DEBUG"], Path(environ["NCCL_DEBUG_FILE"]).name) == ("INFO", "nccl.%h.%p")
    status = life.ready()
    assert all("NCCL_DEBUG" not in change for change in status["changes"])
    first, second, *_ = incidents(life)
    *gpus, lost = json.loads((first / "gpus.json").read_text())["gpus"]
    assert (lost["index"], lost["of_the_launch"], lost["unobserved"]) == (2, False, "GPU is lost (NVML error 15)")
    assert [(gpu["used_bytes"], gpu["utilisation_percent"], gpu["of_the_launch"]) for gpu in gpus] == [
        (5 << 30, 100, True),
        (0, 0, True),
    ]
    assert {"driver", "cuda"} <= set(told(first)["versions"])
    (holder,) = gpus[0]["processes"]
    assert (holder["pid"], holder["of_the_engine"]) == (os.getpid(), False)
    assert holder["name"]
    assert "nccl.host.71.log" not in {file.name for file in first.iterdir()}
    assert (second / "nccl.host.71.log").read_text() == "NCCL INFO of ...\n"
    assert fact(life.told("engine.stalled")[1], "incident") == second.name
    assert life.stop() == 0
