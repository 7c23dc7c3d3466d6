"""NCCL's RAS service, asked for an engine: answering, late, stopped, another's, and none at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu_llm.adapters.nccl_ras import ask
from tests.support import fake_ras
from tests.support.toy_setup import free_port

WHOLE = fake_ras.HEAD + fake_ras.REST


@contextmanager
def listening(port: int, how: str = "answers", host: str = "127.0.0.1") -> Iterator[int]:
    """The pid of one that listens."""
    argv = [sys.executable, "-S", fake_ras.__file__, host, str(port), how]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"ready\n"
        try:
            yield popen.pid
        finally:
            popen.kill()


def at(port: int, host: str = "localhost") -> dict[str, str]:
    return {"NCCL_RAS_ADDR": f"{host}:{port}"}


def test_the_whole_answer_of_an_engines_process_is_kept() -> None:
    port = free_port()
    with listening(port) as pid:
        assert ask(at(port), (os.getpid(), pid), 2.0) == (WHOLE, "")


@pytest.mark.parametrize(("host", "written"), [("::1", "[::1]"), ("::", "[::]"), ("0.0.0.0", "0.0.0.0")])
def test_it_is_found_wherever_it_listens(host: str, written: str) -> None:
    port = free_port()
    with listening(port, host=host) as pid:
        assert ask(at(port, written), (pid,), 2.0) == (WHOLE, "")


def test_what_has_come_by_the_end_is_kept_when_the_rest_does_not_come() -> None:
    port, begun = free_port(), time.monotonic()
    with listening(port, "late") as pid:
        answer, why = ask(at(port), (pid,), 1.0)
    assert (answer, why) == (f"{fake_ras.HEAD}\n[more was not waited for]\n", "")
    assert time.monotonic() - begun < 5


def test_of_two_that_share_the_port_the_one_that_is_stopped_does_not_cost_the_answer() -> None:
    port = free_port()
    with listening(port) as well, listening(port) as stopped:
        os.kill(stopped, signal.SIGSTOP)
        # Twenty turns of a coin at most: one that meets the stopped one takes 0.4 s.
        for _ in range(3):
            assert ask(at(port), (well, stopped), 8.0) == (WHOLE, "")


def test_the_answer_of_another_jobs_process_on_the_same_port_is_not_taken_for_the_engines() -> None:
    port = free_port()
    with listening(port) as ours, listening(port, "late"):
        for _ in range(5):
            assert ask(at(port), (ours,), 8.0) == (WHOLE, "")
    port = free_port()
    with listening(port) as ours, listening(port):
        os.kill(ours, signal.SIGSTOP)
        answer, why = ask(at(port), (ours,), 1.0)
        assert answer == ""
        assert why in ("no answer in time", "another job's NCCL has answered")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("mute", "no answer in time"),
        ("stranger", "what listens there is not NCCL's: it says b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'"),
    ],
)
def test_one_that_does_not_greet_gives_nothing_and_costs_no_more_than_the_limit(how: str, why: str) -> None:
    port, begun = free_port(), time.monotonic()
    with listening(port, how) as pid:
        assert ask(at(port), (pid,), 1.0) == ("", why)
    assert time.monotonic() - begun < 5


def test_one_that_goes_away_after_the_greeting_gives_nothing() -> None:
    port = free_port()
    with listening(port, "leaves") as pid:
        assert ask(at(port), (pid,), 1.0) == ("", "it has greeted and then said nothing")


def test_why_nothing_is_asked_is_told() -> None:
    port = free_port()
    assert ask(at(port), (os.getpid(),), 2.0) == (
        "",
        f"nothing listens on port {port}: the engine has not come to NCCL, or its NCCL is older than 2.24",
    )
    with listening(port) as pid:
        assert ask(at(port), (os.getpid(),), 2.0) == (
            "",
            f"port {port} is another's: no process of the engine is seen to listen there",
        )
        assert ask({**at(port), "NCCL_RAS_ENABLE": "0"}, (pid,), 2.0) == (
            "",
            "NCCL_RAS_ENABLE=0 keeps it from answering",
        )


def test_the_port_is_28028_unless_the_environment_names_one() -> None:
    for environment in ({}, {"NCCL_RAS_ADDR": ""}, {"NCCL_RAS_ADDR": "localhost"}):
        assert "28028" in ask(environment, (), 2.0)[1]


def test_an_ended_process_and_one_that_may_not_be_seen_are_passed_over() -> None:
    popen = subprocess.Popen(["true"])
    popen.wait()
    assert ask(at(free_port()), (popen.pid, 1), 2.0)[0] == ""
    assert Path("/proc/1").exists()
