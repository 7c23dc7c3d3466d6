"""mgpud against the real vLLM on CPU, tensor parallel 2."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine.conftest import MakeSetup
from tests.support.daemons import MGPUD, Daemon, complete, processes_of, running

#: A start takes 20 to 50 s on two cores; a test must only notice that it never ends.
START_S = 300
pytestmark = pytest.mark.engine


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def test_three_faults_are_answered_by_three_rungs_and_the_next_daemon_begins_where_that_ended_and_nothing_is_left(
    make_setup: MakeSetup, tmp_path: Path
) -> None:
    setup = make_setup({"MGPU_FAULT": "p2p-hang,exit-in-capture,broken-gpu"}, (), eager=False)
    before = shared_memory()
    with running(setup.config_file, setup.socket, tmp_path / "log") as daemon:
        first = daemon.wait_until("ready", 2 * START_S)
        assert complete(setup.url)
        shown = daemon.ctl("status").stdout
        assert daemon.stop() == 0
    assert [(attempt["rung"], attempt["outcome"], attempt["cause"]) for attempt in first["attempts"]] == [
        ("base", "stalled", "stalled-in-distributed-init"),
        ("p2p-off", "crashed", "cuda-out-of-memory"),
        ("p2p-off+eager", "crashed", "gpu-fault"),
        ("p2p-off+eager+tp-1", "ready", ""),
    ]
    stalled, no_memory, broken, _ = first["attempts"]
    quiet = re.search(r"nothing moved for (\d+) s, while something spins", stalled["summary"])
    assert quiet is not None
    assert 8 <= int(quiet[1]) <= 20
    assert any("VLLM::Worker" in seen and "burns" in seen for seen in stalled["evidence"])
    assert "in warm-up or graph capture, with the KV cache in place" in no_memory["summary"]
    assert "uncorrectable ECC error encountered" in broken["summary"]
    assert first["changes"] == [
        "NCCL_P2P_DISABLE=1",
        "--disable-custom-all-reduce --enforce-eager",
        "--tensor-parallel-size 2 -> 1",
    ]
    assert "degraded (rung p2p-off+eager+tp-1)" in shown
    assert "a tenth of the all-reduce bandwidth" in " ".join(shown.split())
    assert told(daemon) == [
        "engine.stalled",
        "engine.crashed",
        "engine.crashed",
        "engine.ready",
        "engine.degraded",
        "engine.stopped",
    ]
    with running(setup.config_file, setup.socket, tmp_path / "again") as daemon:
        again = daemon.wait_until("ready", START_S)
        assert complete(setup.url)
        assert daemon.stop() == 0
    assert (again["attempt"], again["rung"], again["degraded"]) == (1, "p2p-off+eager+tp-1", True)
    assert told(daemon) == ["rung.remembered", "engine.ready", "engine.degraded", "engine.stopped"]
    assert processes_of(setup.runtime_dir) == []
    assert shared_memory() <= before


def test_a_healthy_load_is_left_alone_and_a_killed_worker_brings_the_engine_back_on_the_same_rung(
    make_setup: MakeSetup, tmp_path: Path
) -> None:
    setup, before = make_setup({}, ()), shared_memory()
    with running(setup.config_file, setup.socket, tmp_path / "log") as daemon:
        first = daemon.wait_until("ready", START_S)
        assert (first["attempt"], first["rung"], first["degraded"], first["attempts"][-1]["outcome"]) == (
            1,
            "base",
            False,
            "ready",
        )
        phases = re.findall(r"engine\.phase phase=(\S+) attempt=1", daemon.log())
        assert phases == ["distributed-init", "weights", "warm-up", "api"]
        os.kill(worker(setup.runtime_dir), signal.SIGKILL)
        second = daemon.wait_for(lambda status: status["attempt"] == 2 and status["state"] == "ready", START_S)
        assert complete(setup.url)
        assert daemon.stop(signal.SIGINT) == 0
    # vLLM itself ends with exit code 0 when a worker dies while it serves, and names the signal only where it has it in time.
    died = second["attempts"][0]
    assert (died["outcome"], second["rung"]) == ("died", "base")
    assert died["cause"] in ("worker-killed", "worker-died")
    assert "exit code 0" in died["summary"]
    assert processes_of(setup.runtime_dir) == []
    assert shared_memory() <= before


def test_an_argument_that_vllm_refuses_ends_the_daemon_with_65_and_vllms_own_words(make_setup: MakeSetup) -> None:
    setup = make_setup({}, ("--no-such-flag",))
    done = subprocess.run(
        [MGPUD, "--config", setup.config_file], capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 65
    assert "daemon.gave-up" in done.stderr
    assert "vLLM refused its arguments: unrecognized arguments: --no-such-flag" in done.stderr
    assert processes_of(setup.runtime_dir) == []


def told(daemon: Daemon) -> list[str]:
    """Its events that make the story, by name."""
    story = r"engine\.(stalled|crashed|died|ready|degraded|stopped)|rung\.\w+"
    return [name for name in (line.split()[0] for line in daemon.events()) if re.fullmatch(story, name)]


def worker(runtime_dir: Path) -> int:
    return next(int(entry.split()[0]) for entry in processes_of(runtime_dir) if "VLLM::Worker" in entry)
