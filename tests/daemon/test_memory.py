"""What a daemon keeps from one life to the next: recordings of its loads, and what they have taught it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.daemon.conftest import Begin
from tests.daemon.lives import Life, fact, living
from tests.support.daemons import MGPUCTL
from tests.support.fake_setup import FakeSetup

SHORT = {"patience.distributed_init": 2, "retries.attempts": 2}


def records(life: Life) -> list[Path]:
    return sorted((life.setup.folder / "state" / "records").iterdir())


def replayed(file: Path) -> dict[str, Any]:
    done = subprocess.run([MGPUCTL, "replay", str(file), "--json"], check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def ended(life: Life) -> None:
    life.process.terminate()
    assert life.ended() == 0


def test_every_load_leaves_a_recording_which_replays_to_the_verdict_that_was_given(begin: Begin) -> None:
    life = begin("hang-init unless NCCL_P2P_DISABLE=1", SHORT)
    status = life.ready()
    ended(life)
    stalled, healthy = records(life)
    assert stalled.name.endswith("-a1-base-stalled.jsonl.gz")
    assert healthy.name.endswith("-a2-p2p-off-healthy.jsonl.gz")
    found, attempt = replayed(stalled), status["attempts"][0]
    assert (found["outcome"], found["cause"], found["phase"]) == ("stalled", attempt["cause"], attempt["phase"])
    assert abs(found["verdict_at"] - attempt["duration_s"]) < 0.001
    assert found["evidence"] == attempt["evidence"]
    assert found["decision"] == "step to rung p2p-off"
    assert replayed(healthy)["outcome"] == "healthy"


def test_a_stall_is_confirmed_by_where_the_engines_threads_stand(begin: Begin) -> None:
    life = begin("hang-init unless NCCL_P2P_DISABLE=1", SHORT)
    life.ready()
    evidence = life.status()["attempts"][0]["evidence"]
    assert "stacks: two looks found every thread in the same place" in evidence
    assert any("fake_engine" in seen and " stands in " in seen for seen in evidence)
    suspected = life.told("engine.suspected")[0]
    assert fact(suspected, "phase") == "distributed-init"


def test_without_stacks_the_verdict_takes_twice_the_patience_and_says_so(begin: Begin) -> None:
    life = begin("hang-init unless NCCL_P2P_DISABLE=1", {**SHORT, "heartbeat.stacks": False})
    life.ready()
    (warned,) = life.told("stacks.inconclusive")
    assert fact(warned, "why") == "heartbeat.stacks is false"
    assert any("stacks prove nothing: " in seen for seen in life.status()["attempts"][0]["evidence"])
    ended(life)
    found = replayed(records(life)[0])
    assert found["verdict_at"] - found["last_progress_at"] >= 4.0


def test_an_engine_that_crashes_and_one_that_is_stopped_leave_their_recordings_too(begin: Begin) -> None:
    crashed = begin("exit=3", {"retries.attempts": 1})
    assert crashed.ended() == 69
    (file,) = records(crashed)
    assert file.name.endswith("-a1-base-crashed.jsonl.gz")
    assert replayed(file)["cause"] == causes_of(crashed) == "engine-exited"
    stopped = begin("hang-weights", {})
    stopped.wait_log("engine.phase phase=weights")
    ended(stopped)
    (file,) = records(stopped)
    assert file.name.endswith("-a1-base-stopped.jsonl.gz")
    assert replayed(file)["outcome"] == "running"


def causes_of(life: Life) -> str:
    """The cause of the one failure that the log tells."""
    (told,) = life.told("engine.crashed")
    return fact(told, "cause")


def test_a_start_teaches_the_next_life_what_is_usual_and_how_long_quiet_may_last(tmp_path: Path) -> None:
    # Long enough in the load to be asked about it.
    setup = FakeSetup(folder=tmp_path, scenario="load_s=4")
    with living(setup, log="first") as life:
        life.ready()
        ended(life)
    history = tmp_path / "state" / "history.json"
    document = json.loads(history.read_text())
    document["starts"][0]["quiet_s"]["distributed-init"] = 20.0
    history.write_text(json.dumps(document))
    with living(setup, log="second") as life:
        life.wait_log("engine.phase phase=distributed-init")
        phases = {phase["name"]: phase for phase in life.status()["phases"]}
        life.ready()
        ended(life)
    learnt, untouched = phases["distributed-init"], phases["compile"]
    assert (learnt["patience_s"], learnt["learnt"]) == (100.0, True)
    assert (untouched["patience_s"], untouched["learnt"]) == (30.0, False)
    assert learnt["usual_s"] == document["starts"][0]["phase_s"]["distributed-init"]
    first, second = json.loads(history.read_text())["starts"]
    assert first["launch"] == second["launch"]


def test_a_state_folder_that_cannot_be_used_costs_the_memory_and_not_the_service(begin: Begin, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    life = begin("", {"daemon.state_dir": str(blocked / "state")})
    life.ready()
    (warned,) = life.told("state.unusable")
    assert "set daemon.state_dir" in warned
