"""Evidence of a failed attempt is kept before its engine is ended, once, and everybody is told where it lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mgpu_llm.core import report
from mgpu_llm.core.effects import AbandonIncident, Effect, Exit, KeepIncident, KillEngine
from mgpu_llm.core.events import EngineSpawnFailed, IncidentKept
from mgpu_llm.core.states import Backoff, Killing, Starting, Stopped
from tests.core.everything import IDENTITY
from tests.core.world import (
    BAD_FLAG,
    World,
    loading,
    of,
    policy,
    seconds_to_the_verdict,
    serving,
)


def kept(world: World) -> str:
    """The outside has kept what the core wanted kept."""
    incident = world.all(KeepIncident)[-1].incident
    world.send(IncidentKept(at=world.at, attempt=world.attempt, incident=incident))
    return incident


def kinds(effects: list[Effect]) -> list[type[Effect]]:
    return [type(effect) for effect in effects if isinstance(effect, KeepIncident | KillEngine)]


def stalled() -> World:
    world = loading()
    seconds_to_the_verdict(world)
    return world


def crashed() -> World:
    return loading().exits(1)


def refused() -> World:
    return loading().say(BAD_FLAG).exits(2)


def died() -> World:
    return serving().exits(0)


def never_spawned() -> World:
    world = World(policy=policy()).start()
    world.send(EngineSpawnFailed(at=world.at, attempt=1, reason="no such file", hopeless=True))
    return world


@pytest.mark.parametrize("failed", [stalled, crashed, refused, died, never_spawned])
def test_whatever_fails_its_evidence_is_kept_once_and_before_the_engine_is_ended(failed: Callable[[], World]) -> None:
    world = failed()
    assert kinds(world.effects) == [KeepIncident, KillEngine]
    (keep,) = world.all(KeepIncident)
    assert keep.outcome == world.last_diagnosis.outcome
    assert (keep.cause, keep.summary, keep.advice) == (
        world.last_diagnosis.cause,
        world.last_diagnosis.summary,
        world.last_diagnosis.advice,
    )
    (told,) = world.announced(f"engine.{keep.outcome}")
    assert told.facts["incident"] == keep.incident


def test_what_is_kept_says_when_which_attempt_why_and_what_is_done_next() -> None:
    world = stalled()
    (keep,) = world.all(KeepIncident)
    assert keep.incident == f"20261124T0016{int(world.at) - 960:02d}Z-a1-{keep.cause}"
    assert (keep.rung, keep.phase, keep.decision) == ("base", "distributed-init", "step to rung p2p-off")
    assert keep.launch == world.policy.ladder.base
    assert keep.duration_s == world.state.run.ended[0].duration_s


def test_a_stop_that_was_asked_for_is_no_incident() -> None:
    for world in (loading(), serving()):
        world.stop()
        assert world.all(KeepIncident) == []


def test_once_it_is_kept_the_status_names_it_for_its_attempt_and_for_no_other() -> None:
    world = stalled()
    assert report.status(world.state, world.policy, world.at, IDENTITY).attempts[-1].incident == ""
    first = kept(world)
    world.gone().exits(1)
    attempts = report.status(world.state, world.policy, world.at, IDENTITY).attempts
    assert [attempt.incident for attempt in attempts] == [first, ""]


def test_evidence_that_cannot_be_kept_holds_nothing_up_and_is_not_named() -> None:
    world = stalled().gone()
    assert isinstance(world.state, Starting)
    assert world.state.run.ended[0].incident == ""


def test_word_of_an_incident_that_nobody_waits_for_changes_nothing() -> None:
    world = stalled()
    kept(world)
    before = world.state
    kept(world)
    assert world.state == before


@pytest.mark.parametrize("final", [False, True])
def test_a_stop_does_not_wait_for_evidence(final: bool) -> None:
    world = stalled()
    assert of(world.stop(final=final), AbandonIncident) == [AbandonIncident(attempt=1)]
    assert of(world.stop(final=final), AbandonIncident) == []
    kept(world)
    assert isinstance(world.state, Killing)
    assert world.state.run.ended[0].incident == ""
    assert isinstance(world.gone().state, Stopped)


def test_a_stop_while_the_kept_engine_is_killed_abandons_nothing() -> None:
    world = stalled()
    kept(world)
    assert of(world.stop(), AbandonIncident) == []


def test_the_last_word_says_where_the_evidence_of_the_attempts_lies_that_it_tells_of() -> None:
    world = World(policy=policy(attempts=2)).start()
    world.exits(1)
    first = kept(world)
    world.gone()
    assert isinstance(world.state, Backoff)
    world.wait_out_backoff().exits(1)
    second = kept(world)
    world.gone()
    assert isinstance(world.exit, Exit)
    assert world.exit.message.endswith(f". Evidence in /state/incidents: {first}, {second}")


def test_where_no_evidence_could_be_kept_the_last_word_promises_none() -> None:
    world = refused().gone()
    assert isinstance(world.exit, Exit)
    assert "Evidence" not in world.exit.message


def test_where_none_shall_be_kept_none_is() -> None:
    world = loading(incidents="").exits(1)
    assert world.all(KeepIncident) == []
    assert "incident" not in world.announced("engine.crashed")[0].facts
    assert isinstance(world.state, Killing)
    assert not world.state.keeping
