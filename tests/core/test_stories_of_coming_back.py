"""What brings an engine back that was asked to stop, and which counts such a request makes fresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from mgpu_llm.core.effects import (
    Exit,
)
from mgpu_llm.core.events import (
    Event,
    RestartRequested,
    StartRequested,
)
from mgpu_llm.core.states import Backoff, Killing, Starting, Terminating
from tests.core.world import (
    BAD_FLAG,
    NCCL,
    NOT_FREE,
    WORLD_SIZE,
    World,
    loading,
    serving,
)

ASKS: Final = (
    pytest.param(lambda at: StartRequested(at=at), id="start"),
    pytest.param(lambda at: RestartRequested(at=at, by="mgpuctl"), id="restart"),
)


def degraded_and_dying() -> World:
    """An engine that serves on rung p2p-off and has died there twice."""
    world = loading().watch(60.0).gone().serve()
    for _ in range(2):
        world.exits(0).gone().wait_out_backoff().serve()
    assert (world.rung, world.state.run.deaths) == ("p2p-off", 2)
    return world


@pytest.mark.parametrize("ask", ASKS)
def test_a_request_before_a_stopped_engine_has_ended_brings_it_back_where_it_served_with_fresh_counts(
    ask: Callable[[float], Event],
) -> None:
    world = degraded_and_dying()
    before = world.attempt
    world.stop()
    assert world.send(ask(world.at)) == ()
    assert isinstance(world.state, Terminating), "the grace of the old engine is not cut short"
    world.exits(0)
    assert isinstance(world.state, Killing)
    world.gone()
    assert isinstance(world.state, Starting)
    assert (world.rung, world.attempt) == ("p2p-off", before + 1)
    assert (world.state.run.tries, world.state.run.deaths) == (1, 0)


@pytest.mark.parametrize("ask", ASKS)
def test_a_request_while_a_stopped_load_is_killed_brings_it_back_where_it_served_with_fresh_counts(
    ask: Callable[[float], Event],
) -> None:
    world = degraded_and_dying().exits(0).gone()
    assert world.rung == "p2p-off+utilisation-0.85"
    assert world.state.run.tries == 1
    world.stop()
    assert isinstance(world.state, Killing)
    assert world.send(ask(world.at)) == ()
    world.gone()
    assert isinstance(world.state, Starting)
    assert world.rung == "p2p-off"
    assert (world.state.run.tries, world.state.run.deaths) == (1, 0)


@pytest.mark.parametrize("ask", ASKS)
def test_a_request_after_a_stop_of_a_failed_engine_forgets_its_failure_too(ask: Callable[[float], Event]) -> None:
    world = degraded_and_dying().exits(0).gone().exits(1)
    assert isinstance(world.state, Killing)
    world.stop()
    assert world.state.run.tries == 1
    assert world.send(ask(world.at)) == ()
    world.gone()
    assert isinstance(world.state, Starting)
    assert world.rung == "p2p-off"
    assert (world.state.run.tries, world.state.run.deaths) == (1, 0)


@pytest.mark.parametrize("ask", ASKS)
def test_a_request_does_not_hide_the_failure_that_a_kill_leads_to(ask: Callable[[float], Event]) -> None:
    world = World().start().say(BAD_FLAG).exits(2)
    before = world.state
    assert world.send(ask(world.at)) == ()
    assert world.state == before
    world.gone()
    assert world.exit is not None
    assert world.exit.status == 65


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("begin", [loading, serving])
def test_a_request_during_the_end_of_a_final_stop_comes_too_late(
    begin: Callable[[], World], ask: Callable[[float], Event]
) -> None:
    world = begin()
    world.stop(final=True)
    world.send(ask(world.at))
    if isinstance(world.state, Terminating):
        world.exits(0)
    world.gone()
    assert world.exit == Exit(status=0)


def test_restarts_by_hand_do_not_use_up_the_attempts() -> None:
    world = loading(attempts=2)
    for _ in range(5):
        world.send(RestartRequested(at=world.at, by="mgpuctl"))
        world.gone()
        assert isinstance(world.state, Starting)
        assert world.state.run.tries == 1
    world.say(WORLD_SIZE, NCCL).look().watch(60.0).gone()
    assert world.rung == "p2p-off"
    assert world.exit is None


def test_a_request_during_a_backoff_makes_the_counts_fresh() -> None:
    world = loading(attempts=2).say(NOT_FREE).exits(1).gone()
    world.send(StartRequested(at=world.at))
    assert (world.state.run.tries, world.attempt) == (1, 2)
    world.spawn().say(NOT_FREE).exits(1).gone()
    assert isinstance(world.state, Backoff)


def test_a_restart_by_hand_forgets_the_deaths_before_it() -> None:
    world = degraded_and_dying()
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    world.exits(0).gone().serve()
    world.exits(0)
    assert world.state.run.deaths == 1
    assert world.gone().wait_out_backoff().rung == "p2p-off"
