"""start, stop and restart."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ctl.daemons import DEADLINE_S, SampleBackend, command, daemon, environment, mgpuctl, wait_for
from tests.ctl.samples import FAILED, HEALTHY, KILLING, STARTING, STOPPED, TERMINATING

SECOND = replace(HEALTHY, attempt=2)


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_a_request_is_handed_on_with_who_asked(tmp_path: Path, verb: str) -> None:
    backend = SampleBackend(HEALTHY)
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, verb)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{verb} accepted\n", "")
    [(asked, by)] = backend.asked
    assert asked == verb
    assert by.startswith(f"uid {os.getuid()} (")


def test_start_waits_until_the_model_is_served_and_tells_the_way_there_on_stderr(tmp_path: Path) -> None:
    backend = SampleBackend(STOPPED)
    backend.then = [STOPPED, replace(STARTING, attempt=1), replace(STARTING, attempt=2), HEALTHY]
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "start", "--wait")
    assert (done.returncode, done.stdout) == (0, "start accepted\n")
    told = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert told == [
        "stopped",
        "starting, attempt 1 on rung p2p-off, weights, shards 3/8",
        "starting, attempt 2 on rung p2p-off, weights, shards 3/8",
        "ready, attempt 1 on rung base",
    ]


def test_start_of_a_served_model_is_done_at_once(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path:
        assert mgpuctl(socket_path, "start", "--wait").returncode == 0


def test_a_start_that_fails_ends_with_7_and_the_reason(tmp_path: Path) -> None:
    backend = SampleBackend(STOPPED)
    backend.then = [STARTING, FAILED]
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "start", "--wait")
    assert done.returncode == 7
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mgpuctl: start did not succeed: gave up after 2 attempts: 1 on base: stalled 2 on")
    assert last.endswith("out of memory; see: mgpuctl status")


def test_a_start_that_somebody_stops_ends_with_6(tmp_path: Path) -> None:
    backend = SampleBackend(STOPPED)
    backend.then = [replace(STARTING, attempt=2), replace(STOPPED, attempt=2)]
    with daemon(tmp_path, backend) as socket_path:
        assert mgpuctl(socket_path, "start", "--wait").returncode == 6


def test_a_start_asked_for_during_a_stop_is_not_taken_for_stopped(tmp_path: Path) -> None:
    backend = SampleBackend(KILLING)
    backend.then = [KILLING, STOPPED, replace(STARTING, attempt=2), SECOND]
    with daemon(tmp_path, backend) as socket_path:
        assert mgpuctl(socket_path, "start", "--wait").returncode == 0


def test_stop_waits_until_nothing_is_left(tmp_path: Path) -> None:
    backend = SampleBackend(HEALTHY)
    backend.then = [HEALTHY, TERMINATING, KILLING, STOPPED]
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "stop", "--wait")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].endswith("] stopped")


def test_restart_does_not_take_the_old_service_for_the_new_one(tmp_path: Path) -> None:
    backend = SampleBackend(HEALTHY)
    backend.then = [HEALTHY, HEALTHY, TERMINATING, replace(STARTING, attempt=2), SECOND]
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "restart", "--wait")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].endswith("] ready, attempt 2 on rung base")
    assert backend.then == []


def test_a_daemon_that_ends_while_waited_for_is_told_apart_from_none(tmp_path: Path) -> None:
    backend = SampleBackend(STOPPED)
    backend.then = [STARTING]
    with daemon(tmp_path, backend) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "start", "--wait"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: not backend.then, "the first question after the request")
    _, complaints = ctl.communicate(timeout=DEADLINE_S)
    assert ctl.returncode in (3, 5)
    assert complaints.splitlines()[-1].startswith("mgpuctl: the daemon ")
    assert "journalctl -u mgpu-llm" in complaints


def test_ctrl_c_while_waiting_says_that_the_daemon_goes_on(tmp_path: Path) -> None:
    backend = SampleBackend(STOPPED)
    backend.then = [STARTING]
    with daemon(tmp_path, backend) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "start", "--wait"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: not backend.then, "the first question after the request")
        ctl.send_signal(signal.SIGINT)
        _, complaints = ctl.communicate(timeout=DEADLINE_S)
    assert ctl.returncode == 130
    assert complaints.splitlines()[-1] == "mgpuctl: no longer waiting; the daemon goes on with it"
