"""Real starts, replayed through the supervisor, must be judged as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mgpu_llm.core.effects import KillEngine, NotifyReady, ProbeCompletion, ProbeHealth
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineExited,
    EngineSpawned,
    Event,
    GpusSampled,
    GpusUnobserved,
    HealthProbed,
    LineRead,
    ProcessesSampled,
    StartRequested,
    Ticked,
)
from mgpu_llm.core.ladder import Kind
from mgpu_llm.core.states import Backoff, Killing, Ready, Starting
from tests.core.world import BASE, NCCL, ON_CPU, World, policy
from tests.support import recordings
from tests.support.recordings import Recording, cut, events, load, of_row

HEALTHY = ("cpu-tp2-eager", "h200-tp2-72b-dummy", "h200-tp2-cold-compile")
#: Hang -> when the last real progress was, in seconds since the spawn, as the people who recorded it measured.
HANGS = {"h200-tp2-p2p-hang": 69.2, "h200-tp2-rank-missing": 59.9}
CRASHES = ("cpu-tp2-omp-error", "h200-tp2-gpu-taken")
#: Healthy starts stood still for at most 2.5 s over all signals together; a sample more is the replay's own grain.
LONGEST_HEALTHY_QUIET_S = 3.0
#: A verdict may come this long after the last progress, whatever the phase's patience.
VERDICT_WITHIN_S = 20.0


def replay(recording: Recording, happened: Iterator[Event] | None = None) -> tuple[World, dict[Phase, float]]:
    """The world after the recording, which stops at a verdict, and the longest quiet of each phase."""
    world = World(policy=policy(BASE if recording.has_gpus else ON_CPU), at=0.0)
    world.send(StartRequested(at=0.0))
    longest = dict.fromkeys(Phase, 0.0)
    for event in happened if happened is not None else events(recording):
        world.at = event.at
        effects = world.send(event)
        if not isinstance(world.state, Starting):
            break
        if any(isinstance(effect, ProbeHealth) for effect in effects):
            asking = world.state.progress
            assert asking.phase is Phase.API or not asking.spoke_known_words, "asked for service before it could be"
            world.send(HealthProbed(at=event.at, attempt=1, healthy=False, detail="connection refused"))
        heart = world.state.progress
        longest[heart.phase] = max(longest[heart.phase], heart.quiet_s)
    return world, longest


def test_every_recording_is_judged_here() -> None:
    assert set(recordings.names()) == {*HEALTHY, *HANGS, *CRASHES}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_start_is_never_killed_and_becomes_ready_when_its_server_answers(name: str) -> None:
    recording = load(name)
    assert recording.ended_by == "healthy"
    world, longest = replay(recording)
    assert world.all(KillEngine) == []
    assert world.all(NotifyReady) == []
    assert isinstance(world.state, Starting)
    assert max(longest.values()) <= LONGEST_HEALTHY_QUIET_S
    asked = world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200"))
    assert ProbeCompletion(attempt=1) in asked
    world.send(CompletionProbed(at=world.at, attempt=1, served=True, detail="200"))
    assert isinstance(world.state, Ready)
    assert world.all(NotifyReady) == [NotifyReady()]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_start_goes_through_its_phases_in_order_and_says_when_it_serves(name: str) -> None:
    world, _ = replay(load(name))
    assert isinstance(world.state, Starting)
    seen = [str(said.facts["phase"]) for said in world.announced("engine.phase")]
    assert seen == sorted(seen, key=[phase.label for phase in Phase].index)
    assert {"distributed-init", "weights", "warm-up", "api"} <= set(seen)
    assert world.state.progress.serving


@pytest.mark.parametrize(("name", "last_moved_s"), HANGS.items())
def test_a_recorded_hang_is_a_stall_in_distributed_init_soon_after_the_last_progress(
    name: str, last_moved_s: float
) -> None:
    world, _ = replay(load(name))
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "stalled-in-distributed-init"
    assert world.at - last_moved_s <= VERDICT_WITHIN_S
    assert "NCCL peer-to-peer" in world.last_diagnosis.advice
    assert any("vLLM is using nccl" in seen for seen in world.last_diagnosis.evidence)


@pytest.mark.parametrize(
    ("name", "utilisation", "ranks"), [("h200-tp2-p2p-hang", 100, 2), ("h200-tp2-rank-missing", 0, 1)]
)
def test_a_hang_that_spins_the_gpus_is_told_from_one_in_which_a_rank_waits_for_another(
    name: str, utilisation: int, ranks: int
) -> None:
    world, _ = replay(load(name))
    assert world.last_diagnosis.summary.endswith("while something spins")
    evidence = world.last_diagnosis.evidence
    assert sum(f"utilisation {utilisation} %" in seen for seen in evidence) == 2
    assert sum("burns 1.0 cores without getting anywhere" in seen for seen in evidence) == ranks
    assert sum("cores without getting anywhere" in seen for seen in evidence) == ranks


@pytest.mark.parametrize("name", HANGS)
def test_a_recorded_hang_is_answered_with_p2p_off_and_then_with_fewer_gpus(name: str) -> None:
    world, _ = replay(load(name))
    assert world.last_diagnosis.cures == {Kind.TRANSPORT, Kind.GPUS}
    assert world.gone().rung == "p2p-off"
    world.say(NCCL).look().watch(60.0)
    assert world.gone().rung == "tp-1"


@pytest.mark.parametrize("name", HANGS)
def test_a_recorded_hang_is_noticed_without_gpus_too_only_later(name: str) -> None:
    recording = load(name)
    blind = (
        GpusUnobserved(at=event.at, attempt=1, reason="NVML did not answer in 2 s")
        if isinstance(event, GpusSampled)
        else event
        for event in events(recording)
    )
    world, _ = replay(recording, blind)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "stalled-in-distributed-init"
    assert world.at - HANGS[name] <= 3 * VERDICT_WITHIN_S


def test_the_recorded_refusal_of_settings_is_an_exit_with_the_assertions_text() -> None:
    recording = load("cpu-tp2-omp-error")
    assert recording.exit_status == 1
    world, _ = replay(recording)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "engine-exited"
    assert "AssertionError: Not enough allowed NUMA nodes to bind threads" in world.last_diagnosis.summary


def test_the_recorded_gpu_that_another_process_holds_is_named_when_the_engine_ends() -> None:
    world, _ = replay(load("h200-tp2-gpu-taken"))
    assert isinstance(world.state, Starting), "the recording stops before the engine does"
    world.exits(1)
    assert world.last_diagnosis.cause == "gpu-not-free"
    assert world.last_diagnosis.summary.startswith("GPU memory is not free: 107.83 of 139.8 GiB")


def test_the_recorded_gpu_that_another_process_holds_is_named_too_when_the_engine_never_ends() -> None:
    world, _ = replay(load("h200-tp2-gpu-taken"))
    assert isinstance(world.state, Starting)
    last, gpus = tuple(world.state.progress.processes.values()), world.state.progress.gpus
    named_at = next(
        row["t"] for row in load("h200-tp2-gpu-taken").rows if "ValueError: Free memory" in row.get("line", "")
    )
    world.watch(400.0, lambda _: world.look(*last, gpus=gpus))
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "gpu-not-free"
    assert world.at - named_at < 45.0
    world.gone()
    assert isinstance(world.state, Backoff), "the GPU may be free again soon"


@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_start_is_asked_for_service_between_its_first_known_words_and_its_api(name: str) -> None:
    recording = load(name)
    world = World(policy=policy(BASE if recording.has_gpus else ON_CPU), at=0.0)
    world.send(StartRequested(at=0.0))
    asked = set[tuple[bool, Phase]]()
    for event in events(recording):
        world.at = event.at
        effects = world.send(event)
        assert isinstance(world.state, Starting)
        if any(isinstance(effect, ProbeHealth) for effect in effects):
            asked.add((world.state.progress.spoke_known_words, world.state.progress.phase))
            world.send(HealthProbed(at=event.at, attempt=1, healthy=False, detail="connection refused"))
    assert asked <= {(False, Phase.BOOT), (True, Phase.API)}
    assert (True, Phase.API) in asked


# -- how recordings are read ------------------------------------------------------------------------------------------


def test_events_come_in_the_order_of_time_with_a_tick_each_half_second() -> None:
    recording = load("cpu-tp2-eager")
    happened = list(events(recording, attempt=7, spawned_at=100.0))
    assert happened[0] == EngineSpawned(at=100.0, attempt=7, pid=5072)
    times = [event.at for event in happened]
    assert times == sorted(times)
    ticks = [event for event in happened if isinstance(event, Ticked)]
    assert len(ticks) == int(recording.ended_at / 0.5)
    assert {event.attempt for event in happened if not isinstance(event, Ticked | StartRequested)} == {7}  # type: ignore[union-attr]


def test_what_the_recorder_cleaned_up_is_not_part_of_a_recording() -> None:
    rows = [
        {"t": 0.0, "kind": "note", "what": "cmd"},
        {"t": 1.0, "kind": "log", "line": "kept"},
        {"t": 2.0, "kind": "note", "what": "exit", "rc": 3},
        {"t": 3.0, "kind": "log", "line": "clean-up"},
    ]
    recording = cut("made up", rows)
    assert recording.lines == ("kept",)
    assert (recording.ended_by, recording.ended_at, recording.exit_status) == ("exit", 2.0, 3)
    assert list(events(recording))[-1] == EngineExited(at=2.0, attempt=1, status=3)


def test_a_recording_that_breaks_off_ends_with_its_last_row() -> None:
    assert (cut("made up", [{"t": 4.0, "kind": "log", "line": "x"}]).ended_at, cut("empty", []).ended_at) == (4.0, 0.0)


def test_rows_with_missing_fields_and_unknown_kinds_are_read_as_far_as_they_go() -> None:
    def read(row: dict[str, object]) -> list[Event]:
        return list(of_row({"t": 1.0, **row}, attempt=1, spawned_at=10.0))

    assert read({"kind": "weather"}) == []
    assert read({"kind": "sample"}) == []
    assert read({"kind": "sample", "gpus": [], "procs": []}) == []
    assert read({"kind": "sample", "gpus": [{"util": 3}]}) == []
    assert read({"kind": "log", "line": "\x1b[1;36m(Worker pid=1)\x1b[0;0m x"}) == [
        LineRead(at=11.0, attempt=1, text="(Worker pid=1) x")
    ]
    (seen,) = read({"kind": "sample", "procs": [{"pid": 4}], "gpus": None})
    assert isinstance(seen, ProcessesSampled)
    assert (seen.processes[0].pid, seen.processes[0].read_chars) == (4, None)
    (gpus,) = read({"kind": "sample", "gpus": [{"mem": 644939776}]})
    assert isinstance(gpus, GpusSampled)
    assert (gpus.gpus[0].used_bytes, gpus.gpus[0].utilisation_percent) == (644939776, None)
