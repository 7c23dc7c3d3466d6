"""kill -9 of the daemon: the next one ends what the first left, and serves on the same port."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace

import pytest

from mgpu_llm.adapters.engine.tree import read_stat
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, living, remains, until
from tests.support.daemons import complete, processes_of

SCENARIOS = ("hang-init; grandchildren=2", "grandchildren=2; ignore-sigterm")


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin) -> Mapping[str, Life]:
    return {scenario: begin_for_module(scenario, {"patience.distributed_init": 600}) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_next_daemon_ends_the_orphans_of_one_that_was_killed_and_then_serves(
    lives: Mapping[str, Life], scenario: str
) -> None:
    life = lives[scenario]
    if scenario.startswith("hang"):
        life.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)
        until("the strays", lambda: sum("astray" in seen for seen in processes_of(life.setup.runtime_dir)) == 2)
    else:
        life.ready()
    life.process.send_signal(signal.SIGKILL)
    assert life.ended() == -signal.SIGKILL
    orphans, memory = processes_of(life.setup.runtime_dir), life.setup.memory()
    assert len(orphans) == 6, orphans
    assert len(memory) == 1

    healthy = "" if scenario.startswith("hang") else scenario
    setup = replace(life.setup, scenario=healthy, settings={"stop.grace": 0.5})
    with living(setup, log="next") as successor:
        assert successor.ready()["attempt"] == 1
        told = successor.told("engine.orphan")
        for orphan in orphans:
            pid = orphan.split()[0]
            assert any(f"killed pid {pid} (" in line for line in told)
            stat = read_stat(int(pid))
            assert stat is None or not stat.alive
        assert not memory[0].exists()
        assert complete(setup.url)
        assert successor.story()[: len(told) + 1] == ["engine.orphan"] * len(told) + ["engine.starting"]
        assert successor.stop() == 0
        assert remains(setup) == []
