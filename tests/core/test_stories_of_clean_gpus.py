"""GPUs that a dead engine does not let go of: they are out, told once, and the service goes on without them, or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import report, unusable
from mgpu_llm.core.effects import Exit, RememberRung, SpawnEngine
from mgpu_llm.core.events import EngineGone, EngineSpawned, EngineStuck, RestartRequested, StartRequested
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import Ladder
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Backoff, Failed, Killing, Policy, Ready, Run, Starting, Stopped
from tests.core.world import BASE, NOT_FREE, P2P_OFF, World, policy, serving

WHY = "GPU 1 still holds 5.00 GB more than before the attempt although no process is left that uses it"
DIRTY = (("GPU-b", WHY),)
STUCK = ("pid 71 (VLLM::Worker, state D)",)
HELD = (("GPU-b", f"{STUCK[0]} cannot be ended: the kernel does not let it go"),)


def with_spares(*spares: str, **changes: object) -> Policy:
    return policy(ladder=Ladder(base=BASE, sizes=(1,), spares=spares, **changes))  # type: ignore[arg-type]


def gone(world: World, dirty: tuple[tuple[str, str], ...] = DIRTY) -> World:
    world.send(EngineGone(at=world.at, attempt=world.attempt, dirty=dirty))
    return next_attempt(world)


def next_attempt(world: World) -> World:
    """Whatever follows, without the pause before it."""
    if isinstance(world.state, Backoff):
        world.tick(world.policy.backoff_ceiling_s)
    return world.spawn() if isinstance(world.state, Starting) else world


def stuck(world: World, dirty: tuple[tuple[str, str], ...] = HELD) -> World:
    assert isinstance(world.state, Killing)
    # What is stuck stays, and is left behind.
    world.alive.discard(world.attempt)
    world.send(EngineStuck(at=world.at, attempt=world.attempt, holders=STUCK, dirty=dirty))
    return next_attempt(world)


def gpus(world: World) -> tuple[str, ...] | None:
    return world.all(SpawnEngine)[-1].launch.gpus


def killing(world: World) -> World:
    world.exits(1)
    assert isinstance(world.state, Killing)
    return world


def test_a_gpu_that_stays_dirty_is_replaced_by_a_spare_told_once_and_shown_in_the_status() -> None:
    world = gone(killing(World(policy=with_spares("GPU-c")).start()))
    assert gpus(world) == ("GPU-a", "GPU-c")
    assert world.rung.endswith("gpus-GPU-a,GPU-c")
    (told,) = world.announced("gpu.out")
    assert told.facts == {"gpu": "GPU-b", "why": WHY, "advice": unusable.ADVICE}
    identity = Identity(version="1", model="m", url="u")
    status = report.status(world.state, world.policy, world.at, identity)
    assert status.gpus_out == (f"GPU GPU-b is out: {WHY}; {unusable.ADVICE}",)
    # Told again of the same, nobody hears of it a second time.
    gone(killing(world))
    assert len(world.announced("gpu.out")) == 1
    assert gpus(world) == ("GPU-a", "GPU-c")


def test_without_a_spare_the_service_goes_on_with_fewer_gpus() -> None:
    world = gone(killing(World(policy=with_spares()).start()))
    assert gpus(world) == ("GPU-a",)
    world.stop()
    world.gone()
    assert isinstance(world.state, Stopped)
    assert dict(world.state.run.out) == dict(DIRTY)
    world.send(StartRequested(at=world.at))
    assert gpus(world) == ("GPU-a",), "it is out for planned starts, too"


@pytest.mark.parametrize(
    ("ladder", "why"),
    [
        ({"areas": BY_DEFAULT - {Area.GPUS}}, 'ladder.pin names "gpus"'),
        ({"sizes": (), "no_sizes": "fewer do not hold the weights"}, "fewer do not hold the weights"),
        ({"own": (Remedy(name="mine", env={"A": "1"}),)}, "the admin's own rungs name no others"),
    ],
)
def test_where_no_other_gpus_suffice_it_stops_with_the_reason(ladder: dict[str, object], why: str) -> None:
    own = policy(ladder=Ladder(**{"base": BASE, "sizes": (1,), **ladder}))  # type: ignore[arg-type]
    world = gone(killing(World(policy=own).start()))
    assert isinstance(world.state, Failed)
    assert world.exit is not None
    assert world.exit.status == 69
    assert world.exit.message.startswith(
        f"gave up: GPU GPU-b must not be used any more: {WHY}; no other GPUs suffice ("
    )
    assert why in world.exit.message
    assert world.exit.message.endswith(f"What to do: {unusable.ADVICE}")


def test_with_every_gpu_dirty_a_spare_serves_alone_and_without_one_nothing_is_left() -> None:
    all_of_them = (*DIRTY, ("GPU-a", "so is it"))
    assert gpus(gone(killing(World(policy=with_spares("GPU-c")).start()), all_of_them)) == ("GPU-c",)
    world = gone(killing(World(policy=with_spares()).start()), all_of_them)
    assert isinstance(world.state, Failed)
    assert world.exit is not None
    assert f"GPU GPU-b must not be used any more: {WHY}; GPU GPU-a must not" in world.exit.message


def test_a_remembered_rung_is_led_around_a_gpu_that_is_out_and_where_that_cannot_be_nothing_follows_the_exit() -> None:
    known = KnownGood(rung=P2P_OFF.name, since="2026-11-24T21:05:00Z", cause="stalled")
    for own, expected in (
        (with_spares("GPU-c"), ("GPU-a", "GPU-c")),
        (with_spares(areas=BY_DEFAULT - {Area.GPUS}), None),
    ):
        run = Run(known=known, out=dict(DIRTY))
        world = World(policy=own, state=Stopped(run=run))
        effects = world.send(StartRequested(at=world.at))
        assert any(isinstance(effect, RememberRung) for effect in effects)
        if expected is None:
            assert isinstance(effects[-1], Exit)
            assert isinstance(world.state, Failed)
        else:
            assert gpus(world) == expected
            assert world.rung == "p2p-off+gpus-GPU-a,GPU-c"


def test_a_gpu_that_the_diagnosis_names_is_out_for_good_also_once_it_has_served_again() -> None:
    world = killing(World(policy=with_spares("GPU-c")).start())
    found = replace(world.last_diagnosis, gpus=("GPU-b",))
    run, told = unusable.noted(world.state.run, dict.fromkeys(found.gpus, found.summary))
    assert [one.facts["gpu"] for one in told] == ["GPU-b"]
    assert run.asked_anew().out == {"GPU-b": found.summary}


def test_an_engine_that_cannot_be_ended_is_left_behind_where_other_gpus_suffice() -> None:
    world = stuck(killing(World(policy=with_spares("GPU-c")).start()))
    assert gpus(world) == ("GPU-a", "GPU-c")
    (told,) = world.announced("gpu.out")
    assert told.facts["why"] == HELD[0][1]
    assert world.announced("engine.unkillable") == []


def test_an_engine_that_cannot_be_ended_and_keeps_all_gpus_ends_the_daemon_with_the_reason() -> None:
    world = stuck(killing(World(policy=with_spares()).start()), (*HELD, ("GPU-a", HELD[0][1])))
    assert world.exit is not None
    assert world.exit.status == 69
    assert "GPU GPU-b must not be used any more: pid 71 (VLLM::Worker, state D) cannot be ended" in world.exit.message
    assert "reset the GPUs" in world.exit.message


def test_a_stop_meanwhile_leaves_it_stopped_and_a_start_goes_around_what_is_stuck() -> None:
    world = killing(World(policy=with_spares("GPU-c")).start())
    world.stop()
    stuck(world)
    assert isinstance(world.state, Stopped)
    world.send(StartRequested(at=world.at))
    assert gpus(world) == ("GPU-a", "GPU-c")


def test_a_final_stop_ends_the_daemon_whatever_is_stuck() -> None:
    world = killing(World(policy=with_spares("GPU-c")).start())
    world.stop(final=True)
    stuck(world)
    assert world.exit is not None
    assert world.exit.status == 0


def test_a_restart_of_a_serving_engine_that_leaves_a_gpu_dirty_comes_back_on_the_others() -> None:
    world = serving(ladder=Ladder(base=BASE, sizes=(1,), spares=("GPU-c",)))
    assert isinstance(world.state, Ready)
    world.send(RestartRequested(at=world.at, by="the test"))
    world.exits(0)
    gone(world)
    assert gpus(world) == ("GPU-a", "GPU-c")
    assert isinstance(world.state, Starting)


def test_who_held_memory_before_the_attempt_is_evidence_for_why_it_failed() -> None:
    taken = "GPU 1 holds 30.00 GB before the attempt: pid 4711 (user alice, python train.py) holds 30.00 GB"
    world = World(policy=with_spares())
    world.send(StartRequested(at=world.at))
    world.send(EngineSpawned(at=world.at, attempt=1, pid=702, taken=(taken,)))
    world.say(NOT_FREE).exits(1)
    assert world.last_diagnosis.cause == "gpu-not-free"
    assert taken in world.last_diagnosis.evidence
    assert taken in [said.facts["seen"] for said in world.announced("engine.evidence")]
