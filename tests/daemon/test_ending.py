"""SIGTERM, SIGINT and the end of its terminal end the daemon with 0 wherever it stands, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.ctl.terminal import terminal
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, fact, remains, until
from tests.support.daemons import MGPUD, processes_of
from tests.support.fake_setup import FakeSetup

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def loading(life: Life) -> None:
    life.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)


def serving(life: Life) -> None:
    life.ready()


def waiting(life: Life) -> None:
    life.wait_until("backoff", LIMIT_S)


def stopped(life: Life) -> None:
    loading(life)
    assert life.ctl("stop").returncode == 0
    life.wait_until("stopped", LIMIT_S)


def terminating(life: Life) -> None:
    life.ready()
    assert life.ctl("stop").returncode == 0
    life.wait_until("terminating", LIMIT_S)


PHASES: Mapping[Callable[[Life], None], tuple[str, Mapping[str, object]]] = {
    loading: ("hang-init=spin", {"patience.distributed_init": 600}),
    serving: ("grandchildren=1", {}),
    waiting: ("exit=1", {"retries.backoff": 600, "retries.backoff_ceiling": 600}),
    stopped: ("hang-init", {"patience.distributed_init": 600}),
    # Asked twice: the grace of ten minutes is not waited for.
    terminating: ("ignore-sigterm", {"stop.grace": 600}),
}


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin) -> Mapping[Callable[[Life], None], list[Life]]:
    return {come_to: [begin_for_module(*told) for _ in SIGNALS] for come_to, told in PHASES.items()}


@pytest.mark.parametrize("come_to", PHASES)
def test_a_signal_ends_the_daemon_with_0_and_nothing_is_left(
    lives: Mapping[Callable[[Life], None], list[Life]], come_to: Callable[[Life], None]
) -> None:
    for life in lives[come_to]:
        come_to(life)
    for life, number in zip(lives[come_to], SIGNALS, strict=True):
        life.process.send_signal(number)
    for life in lives[come_to]:
        assert life.ended() == 0, life.log()[-3000:]
        assert life.told("daemon.gave-up") == []
        assert remains(life.setup) == []


def test_a_terminal_that_goes_away_takes_the_daemon_along_that_was_run_there(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path, scenario="hang-init", settings={"patience.distributed_init": 600})
    setup.write()
    with terminal() as seen:
        argv = [str(MGPUD), "--config", str(setup.config_file)]
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=seen.slave)
        try:
            until("its engine", lambda: processes_of(setup.runtime_dir) != [], lambda: seen.raw)
            daemon.send_signal(signal.SIGHUP)
            assert daemon.wait(LIMIT_S) == 0, seen.raw
        finally:
            daemon.kill()
            daemon.wait()
    assert remains(setup) == []


def test_a_signal_before_there_is_any_engine_leaves_nothing_either(begin: Begin) -> None:
    life = begin()
    life.process.send_signal(signal.SIGTERM)
    # Until the loop runs the signal has its ordinary effect, which systemd takes for a clean end as well.
    assert life.ended() in (0, -signal.SIGTERM)
    assert "engine.ready" not in life.story()
    assert processes_of(life.setup.runtime_dir) == []


#: Laid over mgpud by Python itself at its start: the loop breaks when a person asks for a restart.
FAULTY = """
import mgpu_llm.core.supervisor as supervisor
judge = supervisor.step
def step(state, event, policy):
    if type(event).__name__ == "RestartRequested":
        raise LookupError("made to fail")
    return judge(state, event, policy)
supervisor.step = step
"""


def test_a_fault_of_the_daemon_itself_ends_it_with_70_and_takes_the_engine_along(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    life = begin("grandchildren=1; ignore-sigterm", environ={"PYTHONPATH": str(tmp_path)})
    life.ready()
    life.ctl("restart")
    assert life.ended() == 70
    (fault,) = life.told("daemon.fault")
    assert fact(fault, "error") == "LookupError: made to fail"
    assert remains(life.setup) == []
