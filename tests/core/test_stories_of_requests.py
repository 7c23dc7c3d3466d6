"""What the supervisor does when it is asked to stop or start, and when a kill does not go as it should."""

from __future__ import annotations

from mgpu_llm.core import report
from mgpu_llm.core.effects import (
    AbandonIncident,
    Announce,
    Exit,
    ExtendTimeout,
    KillEngine,
    Level,
    NotifyStopping,
    TerminateEngine,
)
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineExited,
    EngineGone,
    EngineStuck,
    HealthProbed,
    LineRead,
    LinesDropped,
    RestartRequested,
    StartRequested,
    Ticked,
)
from mgpu_llm.core.states import Failed, Killing, Starting, Stopped, Terminating
from tests.core.world import (
    NOT_FREE,
    UP,
    World,
    loading,
    of,
    serving,
)

# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_final_stop_before_anything_was_started_ends_the_daemon_with_0() -> None:
    world = World()
    assert world.stop(final=True) == (NotifyStopping(), Exit(status=0))


def test_a_stop_of_a_stopped_engine_changes_nothing() -> None:
    world = World()
    assert world.stop() == ()
    assert world.tick() == ()
    assert report.headline(world.state, world.policy, world.at) == "stopped: no engine runs; mgpuctl start starts it"


def test_a_stop_while_loading_kills_at_once_because_a_load_swallows_sigterm() -> None:
    world = loading()
    effects = world.stop(final=True)
    assert of(effects, NotifyStopping)
    assert of(effects, KillEngine)
    assert not of(effects, TerminateEngine)
    world.gone()
    assert world.exit == Exit(status=0)
    assert world.state.run.ended[-1].outcome == "stopped"


def test_a_stop_while_serving_asks_first_and_kills_what_is_left_when_the_engine_has_ended() -> None:
    world = serving()
    effects = world.stop(final=True)
    assert of(effects, TerminateEngine) == [TerminateEngine(attempt=1)]
    assert of(effects, NotifyStopping)
    assert of(effects, ExtendTimeout)[0].seconds >= world.policy.stop_grace_s + world.policy.kill_deadline_s
    world.exits(0)
    assert isinstance(world.state, Killing)
    world.gone()
    assert world.exit == Exit(status=0)


def test_a_serving_engine_that_does_not_heed_sigterm_is_killed_after_the_grace() -> None:
    world = serving()
    world.stop(final=True)
    assert world.tick(19.9) == ()
    assert of(world.tick(0.2), KillEngine) == [KillEngine(attempt=1)]
    assert world.announced("engine.killing")[0].facts["why"] == "still there 20 s after SIGTERM"


def test_a_second_stop_does_not_wait_for_the_grace() -> None:
    world = serving()
    world.stop()
    effects = world.stop(final=True)
    assert of(effects, KillEngine) == [KillEngine(attempt=1)]
    assert of(effects, NotifyStopping)
    world.gone()
    assert world.exit == Exit(status=0)


def test_a_stop_that_is_not_final_leaves_the_daemon_and_a_start_brings_the_engine_back() -> None:
    world = serving()
    world.stop()
    world.exits(0).gone()
    assert isinstance(world.state, Stopped)
    assert world.exit is None
    world.start().serve()
    assert world.attempt == 2


def test_a_start_by_hand_forgets_the_failures_before_it_and_begins_on_the_base_rung() -> None:
    world = serving().exits(0).gone().wait_out_backoff().exits(1).gone()
    world.stop()
    assert (world.state.run.deaths, world.state.run.tries) == (1, 1)
    world.start()
    assert (world.state.run.deaths, world.state.run.tries) == (0, 1)
    assert (world.rung, world.attempt) == ("base", 3)


def test_a_stop_during_a_backoff_needs_no_kill() -> None:
    world = loading().say(NOT_FREE).exits(1).gone()
    assert not of(world.stop(), KillEngine)
    assert isinstance(world.state, Stopped)


def test_a_final_stop_during_a_backoff_ends_the_daemon() -> None:
    world = loading().say(NOT_FREE).exits(1).gone()
    assert world.stop(final=True) == (NotifyStopping(), Exit(status=0))


def test_a_stop_during_a_kill_replaces_what_was_to_come() -> None:
    world = loading().watch(60.0)
    assert isinstance(world.state, Killing)
    assert world.stop(final=True) == (NotifyStopping(), AbandonIncident(attempt=1))
    world.stop()
    world.gone()
    assert world.exit == Exit(status=0), "a later stop that is not final does not keep the daemon"
    assert world.spawned == [1]


def test_a_start_during_the_kill_of_a_stop_brings_the_engine_back() -> None:
    world = loading()
    world.stop()
    world.send(StartRequested(at=world.at))
    world.gone()
    assert isinstance(world.state, Starting)
    assert world.rung == "base"


def test_a_restart_while_serving_asks_first_and_comes_back_on_the_same_rung() -> None:
    world = loading().watch(60.0).gone().serve()
    assert world.rung == "p2p-off"
    effects = world.send(RestartRequested(at=world.at, by="mgpuctl"))
    assert of(effects, TerminateEngine)
    assert not of(effects, NotifyStopping)
    world.exits(0).gone().serve()
    assert world.rung == "p2p-off"


def test_a_restart_while_loading_kills_and_begins_again_on_the_same_rung() -> None:
    world = loading()
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    world.gone()
    assert isinstance(world.state, Starting)
    assert (world.rung, world.attempt) == ("base", 2)


def test_a_restart_of_a_stopped_engine_starts_it() -> None:
    world = World()
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    assert isinstance(world.state, Starting)


def test_a_restart_during_a_backoff_ends_the_wait() -> None:
    world = loading().say(NOT_FREE).exits(1).gone()
    world.send(RestartRequested(at=world.at, by="mgpuctl"))
    assert isinstance(world.state, Starting)


def test_requests_while_an_engine_loads_or_ends_do_not_spawn_another() -> None:
    world = loading()
    assert world.send(StartRequested(at=world.at)) == ()
    world.watch(60.0)
    assert isinstance(world.state, Killing)
    assert world.send(StartRequested(at=world.at)) == ()
    assert world.send(RestartRequested(at=world.at, by="mgpuctl")) == ()
    serves = serving()
    assert serves.send(StartRequested(at=serves.at)) == ()
    serves.stop()
    serves.send(Ticked(at=serves.at))
    assert isinstance(serves.state, Terminating)


# -- kills -------------------------------------------------------------------------------------------------------------


def test_processes_that_outlive_sigkill_end_the_daemon_with_69_and_no_second_engine() -> None:
    world = loading().watch(60.0)
    world.send(EngineStuck(at=world.at, attempt=1, holders=("pid 71 (VLLM::Worker, state D)", "pid 72")))
    assert world.exit is not None
    assert world.exit.status == 69
    assert "cannot end pid 71 (VLLM::Worker, state D), pid 72" in world.exit.message
    assert "reboot" in world.exit.message
    assert world.spawned == [1]


def test_processes_that_outlive_sigkill_do_not_turn_a_requested_stop_into_a_failure() -> None:
    world = loading()
    world.stop(final=True)
    world.send(EngineStuck(at=world.at, attempt=1, holders=("pid 71",)))
    assert world.exit is not None
    assert world.exit.status == 0


def test_what_a_kill_could_not_clean_up_is_told() -> None:
    world = loading().watch(60.0)
    world.gone("GPU-a still holds 1.2 GB")
    assert [said.facts["what"] for said in world.announced("engine.left")] == ["GPU-a still holds 1.2 GB"]


# -- what must change nothing ------------------------------------------------------------------------------------------


def test_late_words_of_a_dead_attempt_change_nothing() -> None:
    world = loading().watch(60.0).gone()
    before = world.state
    for event in (
        LineRead(at=world.at, attempt=1, text=UP),
        EngineExited(at=world.at, attempt=1, status=0),
        EngineGone(at=world.at, attempt=1),
        HealthProbed(at=world.at, attempt=1, healthy=True, detail=""),
        CompletionProbed(at=world.at, attempt=1, served=True, detail=""),
        LinesDropped(at=world.at, attempt=1, count=5),
    ):
        assert world.send(event) == ()
    assert world.state == before


def test_nothing_changes_a_daemon_that_has_failed() -> None:
    state = Failed(run=loading().state.run, status=69, message="gave up")
    world = World(state=state)
    world.stop(final=True)
    world.send(StartRequested(at=world.at))
    world.tick(1e6)
    assert world.state == state


def test_dropped_lines_are_counted_and_told() -> None:
    world = loading()
    [first] = world.send(LinesDropped(at=world.at, attempt=1, count=4000))
    assert isinstance(first, Announce)
    assert (first.name, first.level, first.facts["count"]) == ("engine.lines-dropped", Level.WARNING, 4000)
    assert world.send(LinesDropped(at=world.at, attempt=1, count=2)) == ()
    assert world.state.run.lines_dropped == 4002


def test_of_a_long_flood_dropped_lines_are_told_each_time_they_have_doubled() -> None:
    world = loading()
    told = [len(world.send(LinesDropped(at=world.at, attempt=1, count=1000))) for _ in range(1000)]
    assert sum(told) == len(range(10, (1_000_000).bit_length() + 1))
    assert world.state.run.lines_dropped == 1_000_000
