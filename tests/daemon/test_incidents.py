"""What is left of an attempt that has failed, whatever it failed of, and what is not in it."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.evidence import (
    FILES,
    PLANTED,
    careless_environment,
    careless_settings,
    folder_of,
    incidents,
    told,
    unpacked,
)
from tests.daemon.lives import Life, fact, until
from tests.support.daemons import MGPUCTL

ONCE = {"retries.attempts": 1, "serving.deaths": 1, "retries.crashes_per_rung": 1}
SCENARIOS: Mapping[str, str] = {
    "stalled": "hang-init",
    "crashed": "exit=3",
    "refused": "bad-flag",
    "died": "exit-serving=3",
}
#: What is not among the files, and why, where an engine has ended before anybody could look.
GONE = {"refused": {"stacks.txt"}, "crashed": {"stacks.txt"}, "died": {"stacks.txt"}, "stalled": set[str]()}


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Life]:
    place = tmp_path_factory.mktemp("careless")
    return {
        name: begin_for_module(
            scenario,
            {**careless_settings(place), **ONCE, "patience.distributed_init": 2},
            careless_environment(),
        )
        for name, scenario in SCENARIOS.items()
    }


def the_incident(life: Life, outcome: str) -> Path:
    """The first attempt's, once the daemon has said that it failed and has gone on."""
    life.wait_log(f"engine.{outcome} ")
    (line, *_) = life.told(f"engine.{outcome}")
    folder = folder_of(life) / fact(line, "incident")
    until("the incident", folder.exists, life.log)
    return folder


@pytest.mark.parametrize("outcome", SCENARIOS)
def test_each_kind_of_failure_leaves_a_whole_incident(lives: Mapping[str, Life], outcome: str) -> None:
    life = lives[outcome]
    folder = the_incident(life, outcome)
    document = told(folder)
    assert document["id"] == folder.name
    assert (document["attempt"], document["rung"], document["outcome"]) == (1, "base", outcome)
    assert document["decision"]
    assert document["evidence"] or outcome == "died"
    names = {file.name for file in folder.iterdir()}
    assert names >= FILES - GONE[outcome] - set(document["not_observed"])
    assert set(document["not_observed"]) <= {"gpus.json", "topology.txt", "kernel.log", "nccl-ras.txt"} | GONE[outcome]
    assert document["recording"] in {file.name for file in (life.setup.state_dir / "records").iterdir()}
    assert "serve" in document["launch"]["argv"]
    assert document["launch"]["environment"]["FAKE_ENGINE"].endswith(SCENARIOS[outcome])
    assert {"mgpu-llm", "python", "kernel"} <= set(document["versions"])


@pytest.mark.parametrize("outcome", SCENARIOS)
def test_only_the_owner_may_write_and_only_the_group_may_read(lives: Mapping[str, Life], outcome: str) -> None:
    folder = the_incident(lives[outcome], outcome)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("outcome", SCENARIOS)
def test_no_secret_of_variables_arguments_lines_and_urls_is_found_in_it(
    lives: Mapping[str, Life], outcome: str
) -> None:
    folder = the_incident(lives[outcome], outcome)
    content = b"\n".join(file.read_bytes() for file in folder.iterdir())
    assert {where for where, secret in PLANTED.items() if secret.encode() in content} == set()
    # What stood beside them is.
    log = (folder / "engine.log").read_text()
    assert "example.org/model" in log
    assert "HF_TOKEN is ..., proxy http://...@127.0.0.1:9/" in log


def test_the_stacks_of_a_stall_are_two_from_before_the_verdict_and_a_fresh_one(lives: Mapping[str, Life]) -> None:
    folder = the_incident(lives["stalled"], "stalled")
    stacks = (folder / "stacks.txt").read_text()
    assert [line for line in stacks.splitlines() if line.startswith("#")] == [
        "# look 1, taken before the verdict",
        "# look 2, taken before the verdict",
        "# look 3, taken after the verdict",
    ]
    assert stacks.count("Worker.break_down (tests/support/fake_engine.py:") == 6


def test_the_processes_of_a_stall_are_told_with_what_they_hold(lives: Mapping[str, Life]) -> None:
    folder = the_incident(lives["stalled"], "stalled")
    processes = json.loads((folder / "processes.json").read_text())
    by_name = {process["status"]["Name"]: process for process in processes}
    core = by_name["VLLM::EngineCor"]
    assert any("/dev/shm/psm_fake" in file for file in core["open"]["files"])
    assert core["open"]["kinds"]["shared memory"] >= 1
    assert "Max open files" in " ".join(core["limits"])
    assert by_name["python3"]["argv"][-2:] == ["--api-key", "..."]


def test_the_last_word_names_it(lives: Mapping[str, Life]) -> None:
    life = lives["refused"]
    folder = the_incident(life, "refused")
    assert life.ended() == 65
    (gave_up,) = life.told("daemon.gave-up")
    assert f"Evidence in {folder.parent}: {folder.name}" in gave_up


def test_the_oldest_go_first_and_status_names_only_what_was_kept(begin: Begin) -> None:
    settings = {"incidents.keep": 1, "retries.crashes_per_rung": 3}
    life = begin("exit=3 unless attempt>=3", settings)
    nothing = begin("exit=3 unless attempt>=2", {"incidents.keep": 0})
    attempts = life.ready()["attempts"]
    (left,) = incidents(life)
    assert left.name == attempts[1]["incident"]
    assert [bool(attempt["incident"]) for attempt in attempts] == [True, True, False]
    assert [attempt["incident"] for attempt in nothing.ready()["attempts"]] == ["", ""]
    assert incidents(nothing) == []
    assert "incident=" not in nothing.told("engine.crashed")[0]


def test_members_of_the_group_read_and_export_them_over_the_socket(begin: Begin, tmp_path: Path) -> None:
    life = begin("exit=3 unless attempt>=2", {**careless_settings(tmp_path / "careless")}, careless_environment())
    life.ready()
    (folder,) = incidents(life)
    listed = json.loads(life.ctl("incidents", "--json").stdout)["incidents"]
    assert [incident["id"] for incident in listed] == [folder.name]
    shown = life.ctl("incident", "show", "last").stdout
    assert shown.splitlines()[0] == folder.name
    assert "engine-exited" in shown
    assert json.loads(life.ctl("incident", "show", folder.name[:12], "--json").stdout)["cause"] == "engine-exited"
    command = [str(MGPUCTL), "--socket", str(life.socket), "incident", "export", "last", "-"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    assert unpacked(archive) == {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    assert life.stop() == 0
    gone = life.ctl("incidents")
    assert gone.returncode == 3
    assert "each incident is a folder in incidents/ below daemon.state_dir" in gone.stderr
