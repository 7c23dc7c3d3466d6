"""Where a planned start begins: on the rung that served last, until that is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import report
from mgpu_llm.core.effects import Effect, RememberRung, SpawnEngine
from mgpu_llm.core.events import ForgetRequested, RestartRequested, StartRequested
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.states import Ready, Run, Starting, Stopped
from tests.core.world import (
    BAD_FLAG,
    BANNER,
    NCCL,
    OUT_OF_MEMORY,
    P2P_OFF,
    UP,
    WORLD_SIZE,
    World,
    loading,
    of,
    policy,
    serving,
)

IDENTITY = report.Identity(version="1", model="m", url="u")
KEY = {"driver": "550.54.14"}
KNOWN = KnownGood(rung="p2p-off", since="2026-11-24T00:01:00Z", cause="nccl-p2p", key=KEY, boot="b1")


def cured() -> World:
    """An engine that hung on the base and serves with peer-to-peer off."""
    world = loading(key=KEY, boot="b1").watch(60.0).gone()
    return world.say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()


def knowing(known: KnownGood = KNOWN) -> World:
    """A daemon that was started and knows from an earlier life what served."""
    world = World(policy=policy(key=KEY, boot="b1"), state=Stopped(run=Run(known=known)))
    return world.start()


def kept(world: World) -> list[KnownGood | None]:
    return [effect.known for effect in world.all(RememberRung)]


def test_a_rung_that_comes_to_service_is_remembered_once_with_its_cause_and_its_key() -> None:
    world = cured()
    (known,) = kept(world)
    assert known is not None
    assert (known.rung, known.cause, known.key, known.boot) == ("p2p-off", "nccl-p2p", KEY, "b1")
    (degraded,) = world.announced("engine.degraded")
    assert (degraded.facts["cause"], degraded.facts["since"]) == ("nccl-p2p", known.since)
    assert "mgpuctl forget" in str(degraded.facts["way_back"])


def test_every_cause_that_led_to_a_rung_is_remembered_once() -> None:
    world = loading().watch(60.0).gone()
    world.say(OUT_OF_MEMORY).exits(1).gone().say(OUT_OF_MEMORY).exits(1).gone()
    world.say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    (known,) = kept(world)
    assert known is not None
    assert (known.rung, known.cause) == ("p2p-off+utilisation-0.80", "nccl-p2p, cuda-out-of-memory")


def test_of_an_engine_on_the_base_rung_nothing_is_remembered() -> None:
    assert kept(serving(key=KEY)) == []


def test_what_was_given_up_is_in_the_status_as_long_as_it_serves_so() -> None:
    world = cured()
    told = report.status(world.state, world.policy, world.at, IDENTITY)
    assert told.degradation is not None
    assert told.degradation.cause == "nccl-p2p"
    assert told.degradation.changes == ("NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce")
    assert told.degradation.cost == P2P_OFF.cost
    assert told.degradation.since.startswith("2026-11-24T")
    world.exits(0)
    assert (
        report.status(world.state, world.policy, world.at, report.Identity(version="1", model="m", url="u")).degradation
        is None
    )


@pytest.mark.parametrize("how", ["stop and start", "restart"])
def test_the_next_planned_start_begins_where_the_last_one_served(how: str) -> None:
    world = cured()
    if how == "restart":
        world.send(RestartRequested(at=world.at, by="mgpuctl"))
        world.exits(0).gone()
    else:
        world.stop()
        world.exits(0).gone()
        assert [rung.standing for rung in report.ladder(world.state, world.policy)][:2] == ["tried", "next"]
        world.start()
    assert (world.rung, world.attempt) == ("p2p-off", 3)
    (told,) = world.announced("rung.remembered")
    assert (told.facts["rung"], told.facts["cause"], told.facts["forget"]) == ("p2p-off", "nccl-p2p", "mgpuctl forget")
    assert kept(world)[-1] == replace(kept(world)[0], starts=1)  # type: ignore[type-var]


def test_a_daemon_that_knows_what_served_is_ready_in_one_attempt() -> None:
    world = knowing().say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    assert (world.rung, world.attempt) == ("p2p-off", 1)
    assert world.all(SpawnEngine)[0].launch.env["NCCL_P2P_DISABLE"] == "1"
    assert kept(world) == [replace(KNOWN, starts=1)], "what serves again is not written twice"
    assert world.announced("engine.degraded")[0].facts["since"] == KNOWN.since


def test_one_rung_up_is_tried_when_it_is_due_and_remembered_where_it_serves() -> None:
    world = knowing(replace(KNOWN, starts=9))
    assert world.rung == "base"
    assert "rung base once" in str(world.announced("rung.remembered")[0].facts["trying"])
    world.say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    assert kept(world) == [replace(KNOWN, starts=0), None]
    assert isinstance(world.state, Ready)
    assert world.state.run.known is None
    assert world.announced("engine.degraded") == []


@pytest.mark.parametrize("words", [(WORLD_SIZE, NCCL), (BAD_FLAG,)])
def test_a_rung_up_that_does_not_serve_gives_way_at_once_and_is_not_tried_at_the_next_start(
    words: tuple[str, ...],
) -> None:
    world = knowing(replace(KNOWN, starts=9))
    world.say(*words).look()
    if words == (BAD_FLAG,):
        world.exits(2)
    else:
        world.watch(60.0)
    world.gone()
    assert isinstance(world.state, Starting)
    assert (world.rung, world.attempt, world.state.run.trial) == ("p2p-off", 2, None)
    world.say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    assert kept(world) == [replace(KNOWN, starts=0)]
    world.stop()
    world.exits(0).gone().start()
    assert world.rung == "p2p-off"


def test_a_rung_up_that_serves_and_then_dies_is_no_trial_any_more() -> None:
    world = knowing(replace(KNOWN, starts=9)).say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    world.exits(0).gone().wait_out_backoff()
    assert isinstance(world.state, Starting)
    assert (world.rung, world.state.run.trial) == ("base", None)


def test_a_reboot_is_a_reason_to_try_one_rung_up() -> None:
    world = knowing(replace(KNOWN, boot="b0"))
    assert world.rung == "base"


def test_a_trial_that_is_stopped_is_over() -> None:
    world = knowing(replace(KNOWN, starts=9))
    world.stop()
    assert world.gone().state.run.trial is None


def test_a_remembered_rung_that_fails_goes_on_down_and_what_serves_then_is_remembered() -> None:
    world = knowing().say(WORLD_SIZE, NCCL).look().watch(60.0).gone()
    assert world.rung == "p2p-off+tp-1"
    world.say(BANNER, UP).look().serve()
    assert [known and known.rung for known in kept(world)] == ["p2p-off", "p2p-off+tp-1"]


def test_a_remembered_rung_is_forgotten_when_it_is_given_up_on() -> None:
    world = knowing()
    world.say(BAD_FLAG).exits(2).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert kept(world)[-1] is None


def test_a_daemon_that_gives_up_and_knows_nothing_has_nothing_to_forget() -> None:
    world = World().start().say(BAD_FLAG).exits(2).gone()
    assert world.exit is not None
    assert kept(world) == []


def forget(world: World) -> tuple[Effect, ...]:
    return world.send(ForgetRequested(at=world.at, by="mgpuctl"))


def test_what_is_forgotten_on_request_is_gone_for_the_next_start_and_changes_nothing_now() -> None:
    world = cured()
    effects = forget(world)
    assert of(effects, RememberRung) == [RememberRung(known=None)]
    assert world.announced("rung.forgotten")[0].facts == {"rung": "p2p-off", "why": "asked by mgpuctl"}
    assert isinstance(world.state, Ready)
    assert world.rung == "p2p-off"
    told = report.status(world.state, world.policy, world.at, IDENTITY)
    assert told.degraded
    assert told.degradation is not None
    assert (told.degradation.since[:11], told.degradation.cause) == ("2026-11-24T", "")
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    world.exits(0).gone()
    assert world.rung == "base"


def test_what_was_forgotten_is_not_remembered_by_what_serves_before_the_next_planned_start() -> None:
    world = knowing()
    forget(world)
    world.say(BANNER, WORLD_SIZE, NCCL, UP).look().serve()
    assert kept(world) == [replace(KNOWN, starts=1), None]
    (degraded,) = world.announced("engine.degraded")
    assert "it is not remembered" in str(degraded.facts["way_back"])
    world.exits(0).gone().wait_out_backoff().serve()
    assert kept(world)[-1] is None, "nor by what serves again after a death"
    world.stop()
    world.exits(0).gone().start()
    assert world.rung == "base"
    world.watch(60.0)
    assert not world.state.run.forgotten


def test_a_restart_is_a_planned_start_also_while_a_failed_attempt_is_cleared_away() -> None:
    world = knowing().say(WORLD_SIZE, NCCL).look().watch(60.0)
    forget(world)
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    world.gone()
    assert (world.rung, world.state.run.tries) == ("base", 1)


def test_where_nothing_is_remembered_there_is_nothing_to_forget() -> None:
    world = serving()
    assert forget(world) == ()


def test_a_rung_that_the_ladder_has_no_more_is_not_begun_with() -> None:
    world = knowing(replace(KNOWN, rung="utilisation-0.85+nonsense"))
    assert world.rung == "base"
    assert world.announced("rung.remembered") == []


def test_a_start_request_in_a_pause_ends_the_pause_and_keeps_the_rung() -> None:
    world = cured().exits(0).gone()
    world.send(StartRequested(at=world.at))
    assert (world.rung, world.state.run.rung == BASE) == ("p2p-off", False)


def test_a_restart_request_in_a_pause_is_a_planned_start() -> None:
    world = loading().exits(1).gone()
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    assert isinstance(world.state, Starting)
    assert (world.rung, world.attempt) == ("base", 2)
