"""Real starts as stories: what the daemon did on the way, and what it would have done next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from mgpu_llm.core import recording
from mgpu_llm.core.effects import KillEngine, NotifyReady, ProbeCompletion, ProbeHealth
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import CompletionProbed, Event, HealthProbed, StartRequested, Ticked
from mgpu_llm.core.recording import Recording
from mgpu_llm.core.states import Backoff, Killing, Ready, Starting
from tests.core.looks import still, unanswered
from tests.core.world import BASE, NCCL, ON_CPU, World, policy
from tests.support import recordings
from tests.support.recordings import load

EXPECTED = recordings.expected()
HEALTHY = [name for name in recordings.names() if name in EXPECTED and EXPECTED[name].outcome == "healthy"]
HANGS = ("h200-tp2-p2p-hang", "h200-tp2-rank-missing")
TICK_S = 0.5


def with_ticks(happened: Iterable[Event]) -> Iterator[Event]:
    """The daemon's own clock beside what was recorded."""
    ticked = 0.0
    for event in happened:
        while ticked + TICK_S <= event.at:
            ticked += TICK_S
            yield Ticked(at=ticked)
        yield event


def replay(recorded: Recording) -> World:
    """The world after the recording, which stops at a verdict. Its server refuses connections until it is asked more."""
    world = World(policy=policy(BASE if recorded.has_gpus else ON_CPU), at=0.0, stacks=unanswered)
    world.send(StartRequested(at=0.0))
    for event in with_ticks(recording.events(recorded)):
        world.at = event.at
        effects = world.send(event)
        if not isinstance(world.state, Starting):
            break
        if any(isinstance(effect, ProbeHealth) for effect in effects):
            asking = world.state.progress
            assert asking.phase is Phase.API or not asking.spoke_known_words, "asked for service before it could be"
            world.send(HealthProbed(at=event.at, attempt=1, healthy=False, detail="connection refused"))
    return world


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_start_is_never_killed_and_becomes_ready_when_its_server_answers(name: str) -> None:
    recorded = load(name)
    assert recorded.ended_by == "healthy"
    world = replay(recorded)
    assert world.all(KillEngine) == []
    assert world.all(NotifyReady) == []
    assert isinstance(world.state, Starting)
    assert world.state.progress.serving is recordings.speaks(recorded)
    assert world.all(ProbeHealth)
    asked = world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200"))
    assert ProbeCompletion(attempt=1) in asked
    world.send(CompletionProbed(at=world.at, attempt=1, served=True, detail="200"))
    assert isinstance(world.state, Ready)
    assert world.all(NotifyReady) == [NotifyReady()]


@pytest.mark.parametrize("name", [name for name in HEALTHY if recordings.speaks(load(name))])
def test_a_healthy_start_that_speaks_announces_its_phases_in_order(name: str) -> None:
    seen = [str(said.facts["phase"]) for said in replay(load(name)).announced("engine.phase")]
    assert seen == sorted(seen, key=[phase.label for phase in Phase].index)
    assert {"weights", "warm-up", "api"} <= set(seen)


def test_a_healthy_start_that_says_nothing_known_is_asked_for_service_all_along() -> None:
    recorded = load("cpu-tp2-says-nothing")
    assert not recordings.speaks(recorded)
    world = replay(recorded)
    assert len(world.all(ProbeHealth)) >= recorded.ended_at / TICK_S - 2
    assert world.announced("engine.phase") == []


@pytest.mark.parametrize("name", HANGS)
def test_a_recorded_hang_is_explained_by_what_nccl_said_last(name: str) -> None:
    world = replay(load(name))
    assert world.last_diagnosis.cause == ("nccl-p2p" if "p2p" in name else "nccl-bootstrap")
    assert "NCCL peer-to-peer" in world.last_diagnosis.advice
    assert any("vLLM is using nccl" in seen for seen in world.last_diagnosis.evidence)


@pytest.mark.parametrize(
    ("name", "utilisation", "ranks"), [("h200-tp2-p2p-hang", 100, 2), ("h200-tp2-rank-missing", 0, 1)]
)
def test_a_hang_that_spins_the_gpus_is_told_from_one_in_which_a_rank_waits_for_another(
    name: str, utilisation: int, ranks: int
) -> None:
    found = replay(load(name)).last_diagnosis
    assert ("every GPU spins" if utilisation else "idle GPUs") in found.summary
    assert sum(f"utilisation {utilisation} %" in seen for seen in found.evidence) == 2
    assert sum("burns 1.0 cores without getting anywhere" in seen for seen in found.evidence) == ranks
    assert sum("cores without getting anywhere" in seen for seen in found.evidence) == ranks


@pytest.mark.parametrize("name", HANGS)
def test_a_recorded_hang_is_answered_with_p2p_off_and_then_with_fewer_gpus(name: str) -> None:
    world = replay(load(name))
    if name == "h200-tp2-rank-missing":
        assert world.gone().rung == "loopback", "idle GPUs: the ranks do not find each other"
        return
    assert world.gone().rung == "p2p-off"
    world.stacks = still
    world.say(NCCL).look().watch(60.0)
    assert world.gone().rung == "p2p-off+tp-1"


def test_the_recorded_refusal_of_settings_is_an_exit_with_the_assertions_text() -> None:
    recorded = load("cpu-tp2-omp-error")
    assert recorded.exit_status == 1
    world = replay(recorded)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "engine-exited"
    assert "AssertionError: Not enough allowed NUMA nodes to bind threads" in world.last_diagnosis.summary


def test_the_recorded_gpu_that_another_process_holds_is_named_when_the_engine_ends() -> None:
    world = replay(load("h200-tp2-gpu-taken"))
    assert isinstance(world.state, Starting), "the recording stops before the engine does"
    world.exits(1)
    assert world.last_diagnosis.cause == "gpu-not-free"
    assert world.last_diagnosis.summary.startswith("GPU memory is not free: 107.83 of 139.8 GiB")


def test_the_recorded_gpu_that_another_process_holds_is_named_too_when_the_engine_never_ends() -> None:
    recorded = load("h200-tp2-gpu-taken")
    world = replay(recorded)
    assert isinstance(world.state, Starting)
    last, gpus = tuple(world.state.progress.processes.values()), world.state.progress.gpus
    named_at = next(row["t"] for row in recorded.rows if "ValueError: Free memory" in row.get("line", ""))
    world.watch(400.0, lambda _: world.look(*last, gpus=gpus))
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "gpu-not-free"
    assert world.at - named_at < 45.0
    world.gone()
    assert isinstance(world.state, Backoff), "the GPU may be free again soon"


def test_the_disk_that_was_lost_is_named_with_who_waits_for_it_and_no_rung_is_tried_for_it() -> None:
    world = replay(load("cpu-tp2-lost-disk"))
    found = world.last_diagnosis
    assert "for storage that delivers not one byte" in found.summary
    assert "VLLM::Worker_TP" in found.summary
    assert any("weight_utils.py" in seen for seen in found.evidence), "where the workers stand"
    world.gone()
    assert isinstance(world.state, Backoff)
    assert world.spawn().rung == "base"


def test_the_hang_in_warm_up_shows_where_the_rank_sleeps_that_the_others_wait_for() -> None:
    found = replay(load("cpu-tp2-hang-warm-up")).last_diagnosis
    assert "stacks: two looks found every thread in the same place" in found.evidence
    assert any("_sleep_for_ever" in seen for seen in found.evidence)
