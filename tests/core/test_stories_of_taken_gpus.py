"""What becomes of a start on GPUs of which others hold so much that vLLM would end at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from mgpu_llm.core import readiness, report, room
from mgpu_llm.core.decision import final_message
from mgpu_llm.core.effects import Level, RememberRung, SpawnEngine
from mgpu_llm.core.events import EngineGone, EngineSpawnFailed, StartRequested
from mgpu_llm.core.ladder import BASE as BASE_RUNG
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport, When
from mgpu_llm.core.states import Backoff, Policy
from tests.core.everything import IDENTITY
from tests.core.world import ASSIGNED, BANNER, BASE, NCCL, ON_CPU, UP, WORLD_SIZE, World, policy

HELD: Final = (
    "GPU 1 has 51.19 of 79.65 GiB free, and utilisation 0.9 asks for more: pid 7 (user al, python) holds 30.56 GB"
)


def started(base: Launch = BASE, **changes: object) -> World:
    begun = World(policy=policy(base, free_is_compared=True, **changes))
    begun.send(StartRequested(at=begun.at))
    return begun


def taken(world: World, rank: int = 1, said: str = HELD) -> World:
    """The attempt that has begun is spared its load."""
    number = world.attempt
    world.send(EngineSpawnFailed(at=world.at, attempt=number, reason=said, rank=rank))
    world.send(EngineGone(at=world.at, attempt=number))
    return world


def after_waiting(world: World, rank: int = 1, said: str = HELD) -> World:
    """It stays so for as long as that is waited for."""
    for _ in range(4):
        taken(world, rank, said)
        world.tick(world.policy.backoff_ceiling_s)
    return taken(world, rank, said)


# -- what must be free --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "load_format", "compares"),
    [
        ("0.8.4", None, False),
        ("0.10.2", None, False),
        ("0.11.0", None, True),
        ("0.26.0+cpu", "dummy", True),
        ("0.32.0", "ipc_cache", False),
        ("1.0", None, True),
        ("", None, False),
        ("dev", None, False),
    ],
)
def test_what_is_free_is_compared_by_versions_that_are_known_to_do_so(
    version: str, load_format: str | None, compares: bool
) -> None:
    assert room.is_compared(version, load_format, {}) is compares
    assert not room.is_compared(version, load_format, {room.LEFT_OUT: "1"})


def test_each_rank_needs_what_it_is_told_to_take() -> None:
    (spawned,) = started().all(SpawnEngine)
    assert spawned.needs_free == {"GPU-a": 0.9, "GPU-b": 0.9}
    (spawned,) = started(replace(BASE, gpus=("0", "1", "2"))).all(SpawnEngine)
    assert list(spawned.needs_free) == ["0", "1"], "nothing runs on the third"


@pytest.mark.parametrize(
    "unknown",
    [
        policy(BASE),
        policy(ON_CPU, free_is_compared=True),
        policy(replace(BASE, utilisation=None), free_is_compared=True),
    ],
    ids=["another vLLM", "no GPUs", "its own default"],
)
def test_where_nobody_knows_what_it_needs_nothing_is_asked(unknown: Policy) -> None:
    assert room.needed(unknown, BASE_RUNG) == {}


# -- what follows -------------------------------------------------------------------------------------------------------


def test_the_load_is_spared_and_who_holds_the_gpu_is_the_cause() -> None:
    begun = taken(started())
    found = begun.last_diagnosis
    assert (found.cause, found.outcome, found.rank) == ("gpu-not-free", "averted", 1)
    assert found.summary == HELD
    assert (found.figures["free"], found.figures["total"]) == (51.19, 79.65)
    assert found.advice == "end the process that holds the GPU, or lower gpus.memory_utilisation"
    assert isinstance(begun.state, Backoff)


def test_a_wait_is_a_warning_leaves_no_incident_and_is_told_with_how_long_it_took() -> None:
    begun = after_waiting(started())
    assert [told.level for told in begun.announced("engine.averted")] == [Level.WARNING] * 5
    assert begun.incidents == []
    told = final_message(begun.state.run, "no")
    waited = 4 * begun.policy.backoff_ceiling_s
    assert told.startswith(f"gave up: no; attempts 1, 2, 3, 4, 5 (base, {waited:.0f} s): GPU 1 has ")


def test_waits_count_for_nothing_where_attempts_are_counted() -> None:
    begun = after_waiting(started(attempts=1, tries_per_cause=1, crashes_per_rung=1))
    assert begun.rung == "tp-1"
    begun.spawn().exits()
    begun.send(EngineGone(at=begun.at, attempt=begun.attempt))
    assert begun.exit is not None, "that was the one load"
    assert "1 attempts in a row have failed" in begun.exit.message


def test_where_nothing_else_is_left_it_is_waited_for_as_long_as_it_takes() -> None:
    begun = started(replace(BASE, gpus=("GPU-a",), tensor_parallel=1))
    for _ in range(200):
        taken(begun, rank=0)
        assert isinstance(begun.state, Backoff)
        assert begun.state.until - begun.at <= begun.policy.backoff_ceiling_s
        begun.tick(begun.policy.backoff_ceiling_s)
    begun.spawn().say(BANNER, WORLD_SIZE, NCCL, ASSIGNED, UP).look().serve()
    assert begun.rung == "base"


def test_what_serves_only_because_others_held_a_gpu_is_not_where_the_next_start_begins() -> None:
    begun = after_waiting(started())
    begun.spawn().say(BANNER, WORLD_SIZE, NCCL, ASSIGNED, UP).look().serve()
    assert (begun.rung, begun.state.run.known, begun.all(RememberRung)) == ("tp-1", None, [])
    (degraded,) = begun.announced("engine.degraded")
    assert degraded.facts["way_back"] == readiness.FORGOTTEN
    status = report.status(begun.state, begun.policy, begun.at, IDENTITY)
    assert status.degradation is not None
    assert status.degradation.way_back == readiness.FORGOTTEN


def test_a_sentence_that_the_table_does_not_know_is_no_more_than_an_engine_that_did_not_come_to_be() -> None:
    assert taken(started(), said="GPU 1 is taken").last_diagnosis.cause == "cannot-spawn"


def test_who_is_just_ending_is_waited_for_before_anything_is_changed() -> None:
    begun, waits = started(), list[float]()
    for _ in range(4):
        taken(begun)
        assert isinstance(begun.state, Backoff)
        waits.append(begun.state.until - begun.at)
        begun.tick(waits[-1])
        assert begun.rung == "base"
    assert waits == [2.0, 4.0, 8.0, 16.0]
    begun.spawn().say(BANNER, WORLD_SIZE, NCCL, ASSIGNED, UP).look().serve()


def test_who_stays_is_left_alone_and_the_other_gpu_is_loaded() -> None:
    begun = after_waiting(started())
    assert begun.rung == "tp-1"
    last = begun.all(SpawnEngine)[-1]
    assert (last.launch.gpus, last.needs_free) == (("GPU-a",), {"GPU-a": 0.9})


def test_a_spare_stands_in_for_it() -> None:
    begun = started()
    begun.policy = replace(begun.policy, ladder=replace(begun.policy.ladder, spares=("GPU-c",)))
    assert after_waiting(begun, rank=0).rung == "gpus-GPU-b,GPU-c"


def test_where_a_little_less_is_free_so_much_is_taken() -> None:
    assert after_waiting(started(), said=HELD.replace("51.19", "70.00")).rung == "utilisation-0.85"


def test_an_answer_of_the_check_that_began_beside_it_does_not_matter_any_more() -> None:
    begun = started(preflight=When.OVERLAP)
    begun.send(EngineSpawnFailed(at=begun.at, attempt=1, reason=HELD, rank=1))
    begun.checked(Checked(transports=(Transport(name=AS_LAUNCHED, works=True),)))
    begun.send(EngineGone(at=begun.at, attempt=1))
    assert isinstance(begun.state, Backoff)
