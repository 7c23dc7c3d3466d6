"""What is counted over a life: each attempt once, how long the service was waited for, and the quiet of each load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mgpu_llm.core import planning
from mgpu_llm.core.diagnosis import Clue, of_stall
from mgpu_llm.core.effects import Effect
from mgpu_llm.core.ending import ended
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import Event
from mgpu_llm.core.progress import begin
from mgpu_llm.core.states import LONGEST_HISTORY, Ready, Run, Starting, State, Stopped
from mgpu_llm.core.supervisor import step
from mgpu_llm.core.tally import Tally, stepped
from tests.core.world import BANNER, NCCL, OUT_OF_MEMORY, UP, WORLD_SIZE, World
from tests.support import excerpts


@dataclass
class Counted(World):
    """A world whose events are counted as the loop counts them."""

    sent: list[Event] = field(default_factory=list)

    def send(self, event: Event) -> tuple[Effect, ...]:
        self.sent.append(event)
        return super().send(event)

    def tally(self) -> Tally:
        told: Tally = Tally()
        state: State = Stopped()
        for event in self.sent:
            before = state
            state, _ = step(before, event, self.policy)
            told = stepped(told, before, state, event.at)
        assert state == self.state
        return told

    def known(self) -> dict[tuple[str, str], int]:
        return {key: count for key, count in self.tally().ended.items() if count}


def started() -> Counted:
    world = Counted()
    world.start()
    return world


def served(world: Counted) -> Counted:
    world.say(BANNER, WORLD_SIZE, NCCL, UP).look()
    world.serve()
    return world


def test_a_daemon_that_has_done_nothing_counts_nothing() -> None:
    told = Tally()
    assert (told.starts, told.services, told.deaths) == (0, 0, 0)
    assert (told.ready_s, told.load_s, told.quiet_s) == (None, None, None)
    assert not any(told.ended.values())


def test_all_that_a_load_may_end_of_is_there_before_it_comes() -> None:
    foreseen = set(Tally().ended)
    assert {cause for _, cause in foreseen} >= set(planning.causes())
    for excerpt in (*excerpts.quoted(), *excerpts.recorded().values()):
        found = excerpts.diagnose(excerpt)
        assert (found.outcome, found.cause) in foreseen or found.outcome == "died", excerpt
    for stall in excerpts.stalls():
        found = of_stall(stall.stalled, Clue())
        assert (found.outcome, found.cause) in foreseen, stall
    for phase in Phase:
        assert ("stalled", f"stalled-in-{phase.label}") in foreseen


def test_an_attempt_that_serves_is_counted_as_over_only_once_it_is_over() -> None:
    world = started()
    world.at += 40.0
    served(world)
    told = world.tally()
    assert (told.starts, told.services, told.ready_s, told.load_s) == (1, 1, 40.0, 40.0)
    assert world.known() == {}
    world.at += 100.0
    world.stop()
    world.exits(0)
    world.gone()
    assert isinstance(world.state, Stopped)
    assert world.known() == {("stopped", "none"): 1}
    assert (world.tally().services, world.tally().deaths, world.tally().wanted_at) == (1, 0, None)


def test_failed_attempts_count_by_outcome_and_cause_and_into_the_time_until_it_served() -> None:
    world = started()
    world.say(BANNER, WORLD_SIZE, NCCL).look()
    world.watch(1000.0)
    stalled_s = world.at - 1000.0
    assert world.last_diagnosis.outcome == "stalled"
    world.gone()
    world.say(OUT_OF_MEMORY)
    world.exits(1)
    world.gone()
    world.at += 30.0
    served(world)
    told = world.tally()
    assert world.known() == {("stalled", "nccl-p2p"): 1, ("crashed", "cuda-out-of-memory"): 1}
    assert (told.starts, told.services, told.load_s) == (3, 1, 30.0)
    assert told.ready_s == stalled_s + 30.0


def test_a_death_is_an_attempt_that_is_over_and_the_service_is_wanted_from_then_on() -> None:
    world = served(started())
    world.at += 500.0
    world.exits(0)
    world.gone()
    world.at += 20.0
    if not isinstance(world.state, Starting):
        world.wait_out_backoff()
    dead_s = world.at - 1500.0
    served(world)
    told = world.tally()
    assert (world.known(), told.deaths) == ({("died", "died-while-serving"): 1}, 1)
    assert told.ready_s == dead_s


def test_the_longest_quiet_is_that_of_the_last_load_that_is_over() -> None:
    world = started()
    world.say(BANNER, WORLD_SIZE).look()
    world.watch(5.0)
    assert world.tally().quiet_s is None
    world.say(NCCL).look()
    served(world)
    assert world.tally().quiet_s == 5.0


def test_nothing_is_forgotten_where_the_history_of_attempts_forgets() -> None:
    told, run = Tally(), Run()
    for number in range(1, LONGEST_HISTORY + 51):
        after = run.closed(ended(Run(attempt=number), 0.0, "boot", 1.0, None))
        told = stepped(told, Stopped(run=run), Stopped(run=after), float(number))
        # That its evidence is kept is told a step later, of the same attempt.
        told = stepped(told, Stopped(run=after), Stopped(run=after.with_incident("i")), float(number))
        run = after.with_incident("i")
    assert len(run.ended) == LONGEST_HISTORY
    assert told.ended[("stopped", "none")] == LONGEST_HISTORY + 50


def test_a_service_that_nobody_was_seen_to_want_took_no_time() -> None:
    loading = Starting(run=Run(attempt=1), since=1.0, progress=begin(1.0))
    ready = Ready(run=loading.run, since=9.0, spawned_at=1.0, progress=loading.progress, pid=7)
    told = stepped(Tally(), loading, ready, 9.0)
    assert (told.ready_s, told.load_s) == (0.0, 8.0)


def test_an_attempt_that_follows_another_without_a_pause_is_a_start_of_its_own() -> None:
    first = Starting(run=Run(attempt=1), since=1.0, progress=replace(begin(1.0), quiet_s=3.0))
    told = stepped(Tally(), first, replace(first, run=Run(attempt=2), progress=begin(9.0)), 9.0)
    assert (told.starts, told.quiet_s) == (1, 3.0)


def test_steps_that_change_nothing_that_is_counted_cost_nothing() -> None:
    told = Tally()
    state = Stopped()
    assert stepped(told, state, state, 5.0) is told
