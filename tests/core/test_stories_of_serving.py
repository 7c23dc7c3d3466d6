"""What the supervisor does once the engine serves, and what it takes to get there."""

from __future__ import annotations

import pytest

from mgpu_llm.core.effects import (
    Announce,
    ExtendTimeout,
    NotifyReady,
    ProbeCompletion,
    ProbeHealth,
)
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import CompletionProbed, HealthProbed, LineRead, StartRequested
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.starting import EXTEND_EVERY_S
from mgpu_llm.core.states import Killing, Ready
from tests.core.world import (
    ASSIGNED,
    NCCL,
    UP,
    WORLD_SIZE,
    World,
    loading,
    of,
    policy,
    serving,
    worker,
)

# -- while serving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, -9])
def test_any_exit_while_serving_is_a_failure_and_starts_anew_on_the_same_rung(status: int) -> None:
    world = serving().exits(status)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "died-while-serving"
    world.gone().wait_out_backoff()
    assert world.rung == "base"
    assert world.attempt == 2


def test_three_failed_probes_in_a_row_are_a_death_and_two_are_not() -> None:
    world = serving()
    for healthy in (False, False, True, False, False):
        assert of(world.tick(10.0), ProbeHealth) == [ProbeHealth(attempt=1)]
        world.send(HealthProbed(at=world.at, attempt=1, healthy=healthy, detail="no answer in 5 s"))
    assert isinstance(world.state, Ready)
    assert len(world.announced("engine.unhealthy")) == 4
    world.tick(10.0)
    world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="no answer in 5 s"))
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.summary == "3 health probes in a row failed, the last with: no answer in 5 s"


def test_a_serving_engine_is_probed_at_its_interval_and_never_twice_at_once() -> None:
    world = serving()
    assert world.tick(9.9) == ()
    assert world.tick(0.2) == (ProbeHealth(attempt=1),)
    assert world.tick(30.0) == ()


def test_an_error_printed_while_serving_is_named_when_the_engine_dies() -> None:
    world = serving().say("(EngineCore pid=9) ERROR 11-22 10:00:00 [core.py:1] RuntimeError: CUDA error: xid").exits(0)
    assert world.last_diagnosis.summary.endswith("with exit code 0: RuntimeError: CUDA error: xid")


def test_three_deaths_within_the_window_step_down_the_ladder() -> None:
    world = serving()
    for _ in range(2):
        world.exits(0).gone().wait_out_backoff()
        assert world.rung == "base"
        world.serve()
    world.exits(0).gone()
    assert world.rung == "p2p-off"
    assert world.state.run.deaths == ()


def test_deaths_outside_the_window_do_not_step_down() -> None:
    world = serving()
    for _ in range(6):
        world.at += 400.0
        world.exits(0).gone().wait_out_backoff().serve()
    assert world.rung == "base"


def test_deaths_on_the_last_rung_end_the_daemon_with_69() -> None:
    world = World(policy=policy(Launch(gpus=("GPU-a",), tensor_parallel=1, utilisation=None), deaths=1))
    world.start().serve().exits(0).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "the engine died 1 times while serving" in world.exit.message


def test_serving_forgives_the_attempts_before_it() -> None:
    world = loading().exits(1).gone().wait_out_backoff().serve()
    assert (world.state.run.tries, world.state.run.tries_on_rung) == (0, 0)


# -- readiness ---------------------------------------------------------------------------------------------------------


def test_ready_comes_only_after_a_completion() -> None:
    world = loading().say(UP)
    assert len(world.all(ProbeHealth)) == 1
    world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200"))
    assert world.all(NotifyReady) == []
    assert of(world.tick(1.5), ProbeCompletion) == [ProbeCompletion(attempt=1)]
    assert of(world.tick(5.0), ProbeCompletion) == [], "one probe at a time"
    world.send(CompletionProbed(at=world.at, attempt=1, served=True, detail="200"))
    assert world.all(NotifyReady) == [NotifyReady()]


def test_a_server_that_says_it_is_up_is_probed_at_once() -> None:
    world = loading()
    world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="refused"))
    effects = world.send(LineRead(at=world.at, attempt=1, text=UP))
    assert of(effects, ProbeHealth) == [ProbeHealth(attempt=1)]
    again = world.send(LineRead(at=world.at, attempt=1, text="INFO:     Uvicorn running on http://0.0.0.0:8000"))
    assert of(again, ProbeHealth) == []


def test_an_engine_without_a_process_is_not_probed() -> None:
    world = World()
    world.send(StartRequested(at=world.at))
    assert of(world.tick(5.0), ProbeHealth) == []
    assert of(world.spawn().tick(0.5), ProbeHealth) == [ProbeHealth(attempt=1)]


# -- systemd's patience ------------------------------------------------------------------------------------------------


def test_systemd_is_asked_for_more_time_only_while_something_moves() -> None:
    world = loading()
    grown = 0

    def grows(_: float) -> None:
        nonlocal grown
        grown += 1
        world.look(worker(rss_bytes=(1500 + 50 * grown) << 20))

    before = len(world.all(ExtendTimeout))
    world.watch(30.0, grows)
    asked = len(world.all(ExtendTimeout)) - before
    assert 3 <= asked <= 30.0 / EXTEND_EVERY_S + 1
    world.watch(EXTEND_EVERY_S + 1)
    before = len(world.all(ExtendTimeout))
    world.watch(60.0)
    assert isinstance(world.state, Killing)
    assert len(world.all(ExtendTimeout)) == before


def test_the_time_asked_for_covers_the_patience_and_the_kill() -> None:
    world = loading().say(ASSIGNED).watch(EXTEND_EVERY_S + 1)
    asked = world.all(ExtendTimeout)[-1].seconds
    assert asked >= world.policy.patience[Phase.WEIGHTS] + world.policy.kill_deadline_s


def test_each_new_attempt_asks_for_its_own_time() -> None:
    world = loading().watch(60.0)
    before = len(world.all(ExtendTimeout))
    world.gone()
    assert len(world.all(ExtendTimeout)) == before + 1


def test_each_phase_is_announced_once() -> None:
    world = World().start().say(WORLD_SIZE, NCCL, WORLD_SIZE, ASSIGNED, NCCL, ASSIGNED, UP)
    assert [said.facts["phase"] for said in world.announced("engine.phase")] == ["distributed-init", "weights", "api"]


def test_a_failure_is_announced_with_its_summary_advice_and_evidence() -> None:
    world = loading().watch(60.0)
    (stalled,) = world.announced("engine.stalled")
    assert stalled.facts["summary"] == world.last_diagnosis.summary
    assert stalled.facts["advice"] == world.last_diagnosis.advice
    seen = [said.facts["seen"] for said in world.all(Announce) if said.name == "engine.evidence"]
    assert seen == list(world.last_diagnosis.evidence)
    assert any("vLLM is using nccl" in str(one) for one in seen)
