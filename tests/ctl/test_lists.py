"""attempts, ladder and logs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mgpu_llm.control_api import rung_to_json
from tests.ctl.daemons import SampleBackend, daemon, mgpuctl
from tests.ctl.samples import FAILED, RUNGS, STARTING, STOPPED


def test_attempts_tells_each_with_cause_advice_and_evidence(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(STARTING)) as socket_path:
        done = mgpuctl(socket_path, "attempts")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].split() == ["ATTEMPT", "RUNG", "OUTCOME", "PHASE", "LASTED", "ENDED"]
    assert lines[1].split() == [
        "1",
        "base",
        "stalled",
        "distributed-init",
        "1",
        "min",
        "9",
        "s",
        "2",
        "min",
        "10",
        "s",
        "ago",
    ]
    assert lines[2].split() == ["cause", "stalled-distributed-init"]
    assert lines[4].strip() == "to do  check the ACS setting of the PCIe switch"
    assert lines[5].strip() == "| vLLM is using nccl==2.28.9"
    assert lines[-1].split() == ["2", "p2p-off", "running", "weights", "41", "s"]


def test_attempts_as_json_is_one_document(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(FAILED)) as socket_path:
        document = json.loads(mgpuctl(socket_path, "attempts", "--json").stdout)
    assert [attempt["cause"] for attempt in document["attempts"]] == ["stalled-distributed-init", "cuda-out-of-memory"]


def test_before_the_first_attempt_there_is_a_sentence(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(replace(STOPPED, attempts=()))) as socket_path:
        done = mgpuctl(socket_path, "attempts")
    assert (done.returncode, done.stdout) == (0, "no attempt yet\n")


def test_ladder_shows_the_exact_changes_and_the_cost_of_each_rung(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "ladder")
    assert done.stdout.splitlines() == [
        "   RUNG               STANDING  CHANGES",
        "1  base               tried     the settings as configured",
        "2  p2p-off            current   NCCL_P2P_DISABLE=1",
        "                                --disable-custom-all-reduce",
        "                                costs: all-reduce runs through host memory, at a tenth of the bandwidth",
        "3  lower-utilisation  next      --gpu-memory-utilization 0.9 -> 0.85",
    ]


def test_ladder_shows_which_rungs_were_passed_over(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.ladder = (replace(RUNGS[0], standing="passed"), *RUNGS[1:])
    with daemon(tmp_path, backend) as socket_path:
        assert "1  base               passed    the settings" in mgpuctl(socket_path, "ladder").stdout
        document = json.loads(mgpuctl(socket_path, "ladder", "--json").stdout)
    assert [rung["standing"] for rung in document["rungs"]] == ["passed", "current", "next"]


def test_ladder_says_for_which_causes_it_is(tmp_path: Path) -> None:
    text = " ".join(mgpuctl(tmp_path / "s", "ladder", "--help").stdout.split())
    assert "The rungs for causes that nobody knows" in text
    assert "mgpuctl plan --cause CAUSE" in text


def test_ladder_as_json_is_one_document(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        document = json.loads(mgpuctl(socket_path, "ladder", "--json").stdout)
    assert document == json.loads(json.dumps({"rungs": [rung_to_json(rung) for rung in RUNGS]}))


def test_logs_gives_as_many_of_the_last_lines_as_asked(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.lines = tuple(f"line {n}" for n in range(100))
    with daemon(tmp_path, backend) as socket_path:
        assert mgpuctl(socket_path, "logs", "-n", "2").stdout == "line 98\nline 99\n"
        assert mgpuctl(socket_path, "logs").stdout.count("\n") == 50


def test_a_silent_engine_has_an_empty_log_and_a_remark(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "logs")
    assert (done.returncode, done.stdout) == (0, "")
    assert "has printed nothing yet" in done.stderr
