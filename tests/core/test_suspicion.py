"""Suspect, then confirm: what a long quiet is looked into with, and what comes of it."""

from __future__ import annotations

import pytest

from mgpu_llm.core import suspicion
from mgpu_llm.core.effects import ExtendTimeout, Level, TakeStacks
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpusUnobserved, Stack, StacksTaken
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, LONGEST_DOUBT_FACTOR, UNCONFIRMED_FACTOR
from mgpu_llm.core.states import Killing, Starting
from mgpu_llm.core.suspicion import AGAIN_S, APART_S, LATE_S, Finding, Suspicion
from tests.core.looks import CONFIRMED_S, stack, unanswered, working
from tests.core.world import BASE, NOT_FREE, World, loading, seconds_to_the_verdict, worker

PATIENCE_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]


def taken(at: float, *stacks: Stack, unobserved: str = "") -> StacksTaken:
    return StacksTaken(at=at, attempt=1, stacks=stacks, unobserved=unobserved)


def suspected() -> World:
    """A world that has been quiet for its patience, and whose first look is under way."""
    world = loading()
    world.stacks = unanswered
    while not world.all(TakeStacks):
        world.watch(0.5)
    assert isinstance(world.state, Starting)
    assert world.state.progress.quiet_s == PATIENCE_S
    return world


def doubt(world: World) -> Suspicion | None:
    assert isinstance(world.state, Starting)
    return world.state.suspicion


# -- confirmed -------------------------------------------------------------------------------------------------------


def test_a_quiet_as_long_as_the_patience_is_looked_at_twice_and_then_called_a_stall() -> None:
    world = loading()
    assert seconds_to_the_verdict(world) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=0.5)
    assert world.looks == 2
    assert "stacks: two looks found every thread in the same place" in world.last_diagnosis.evidence
    assert any("stands in synchronize (torch/cuda/streams.py:105)" in seen for seen in world.last_diagnosis.evidence)
    (announced,) = world.announced("engine.suspected")
    facts = {"attempt": 1, "phase": "distributed-init", "quiet_s": PATIENCE_S, "patience_s": PATIENCE_S}
    assert announced.facts == {**facts, "next": "two looks where its threads stand"}
    assert world.announced("engine.cleared") == []


def test_nobody_looks_at_stacks_before_the_patience_is_over() -> None:
    world = loading().watch(PATIENCE_S - 1.0)
    assert (world.looks, doubt(world)) == (0, None)
    assert world.announced("engine.suspected") == []


def test_the_second_look_is_asked_for_so_long_after_the_first_has_come_and_not_twice() -> None:
    world = suspected()
    world.watch(1.0)
    assert len(world.all(TakeStacks)) == 1, "one look at a time"
    world.send(taken(world.at, stack()))
    came_at = world.at
    while len(world.all(TakeStacks)) == 1:
        world.watch(0.5)
    assert world.at - came_at == APART_S
    assert isinstance(world.state, Starting)
    world.send(taken(world.at, stack()))
    assert isinstance(world.state, Killing)


def test_what_the_engine_itself_has_named_needs_no_more_than_that_nobody_is_seen_to_work() -> None:
    world = loading().say(NOT_FREE)
    assert seconds_to_the_verdict(world) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=0.5)
    blind = loading(look_at_stacks=False).say(NOT_FREE)
    assert seconds_to_the_verdict(blind) == pytest.approx(PATIENCE_S, abs=0.5)
    survived = loading().say(NOT_FREE)
    survived.stacks = working
    survived.watch(40.0)
    assert isinstance(survived.state, Starting), "an error that it has got over kills no engine that works"


# -- cleared ---------------------------------------------------------------------------------------------------------


def test_stacks_that_are_elsewhere_clear_it_and_a_whole_patience_begins() -> None:
    world = suspected()
    world.send(taken(world.at, *(working(1) or ())))
    world.watch(APART_S)
    world.send(taken(world.at, *(working(2) or ())))
    assert doubt(world) is None
    (announced,) = world.announced("engine.cleared")
    assert announced.facts == {"attempt": 1, "phase": "distributed-init", "why": "its stacks are not where they were", "suspected_s": "2.0"}  # fmt: skip # noqa: E501
    assert isinstance(world.state, Starting)
    assert world.state.progress.last_moved_at == world.at
    assert world.state.progress.quiet_s == PATIENCE_S + APART_S, "nothing that is measured has moved"
    world.watch(PATIENCE_S - 0.5)
    assert doubt(world) is None
    world.watch(0.5)
    assert doubt(world) is not None


def test_stacks_that_change_for_ever_hold_off_the_verdict_only_for_so_long() -> None:
    world = loading()
    world.stacks = working
    assert isinstance(world.state, Starting)
    taken_s = world.state.progress.quiet_s + seconds_to_the_verdict(world)
    assert LONGEST_DOUBT_FACTOR * PATIENCE_S <= taken_s <= (LONGEST_DOUBT_FACTOR + 1) * PATIENCE_S + CONFIRMED_S
    assert world.last_diagnosis.cause == "stalled-in-distributed-init"
    assert len(world.announced("engine.suspected")) > 5
    assert len(world.announced("engine.cleared")) == len(world.announced("engine.suspected")) - 1


def test_while_stacks_change_systemd_is_asked_for_more_time_and_while_nothing_moves_it_is_not() -> None:
    still = loading()
    seconds_to_the_verdict(still)
    changing = loading()
    changing.stacks = working
    seconds_to_the_verdict(changing)
    assert len(changing.all(ExtendTimeout)) > len(still.all(ExtendTimeout)) + 5


def test_an_engine_that_moves_between_the_two_looks_is_cleared() -> None:
    world = suspected()
    world.send(taken(world.at, stack()))
    world.watch(0.5)
    world.say("something new")
    world.watch(0.5)
    assert doubt(world) is None
    assert world.announced("engine.cleared")[0].facts["why"] == "it moves again"
    world.send(taken(world.at, stack()))
    assert isinstance(world.state, Starting), "the second look comes too late to matter"
    assert doubt(world) is None


def test_a_look_that_comes_after_a_movement_clears_what_it_was_asked_for() -> None:
    world = suspected()
    world.say("something new")
    world.send(taken(world.at, stack()))
    assert doubt(world) is None
    assert world.announced("engine.cleared")[0].facts["why"] == "it moves again"


def test_a_look_that_nobody_asked_for_changes_nothing() -> None:
    world = loading()
    before = world.state
    assert world.send(taken(world.at, stack())) == ()
    assert world.state == before


# -- blind -----------------------------------------------------------------------------------------------------------


def unseen(world: World) -> str:
    """Why stacks could not tell, as it was announced once."""
    (announced,) = world.announced("stacks.inconclusive")
    assert announced.level is Level.WARNING
    assert announced.facts["consequence"] == "quiet alone has to convince: 16 s of it instead of 8 s"
    return str(announced.facts["why"])


def blind_verdict_after_s(world: World) -> float:
    taken_s = seconds_to_the_verdict(world)
    assert taken_s == pytest.approx(UNCONFIRMED_FACTOR * PATIENCE_S, abs=1.0)
    (words,) = [seen for seen in world.last_diagnosis.evidence if seen.startswith("stacks prove nothing")]
    assert words == f"stacks prove nothing: {unseen(world)}; so it had twice the patience"
    return taken_s


def test_where_stacks_are_switched_off_quiet_alone_has_to_convince() -> None:
    world = loading(BASE, look_at_stacks=False)
    blind_verdict_after_s(world)
    assert unseen(world) == "heartbeat.stacks is false"
    assert world.all(TakeStacks) == []


def test_where_no_thread_shows_python_frames_quiet_alone_has_to_convince() -> None:
    world = loading()
    world.stacks = lambda _: (stack(frames=()),)
    blind_verdict_after_s(world)
    assert unseen(world) == "no thread shows any Python frames"
    assert world.looks >= 2, "it goes on looking"


def test_a_look_that_never_comes_delays_no_verdict() -> None:
    world = loading()
    world.stacks = unanswered
    blind_verdict_after_s(world)
    assert unseen(world) == "no answer within 7 s"
    assert min(DEFAULT_PATIENCE_S.values()) > LATE_S


def test_a_second_look_that_never_comes_is_waited_for_and_then_quiet_has_convinced() -> None:
    world = loading()
    world.stacks = lambda look: (stack(),) if look == 1 else None
    assert seconds_to_the_verdict(world) == pytest.approx(PATIENCE_S + APART_S + LATE_S, abs=1.0)
    assert "stacks prove nothing: no answer within 7 s; so it had twice the patience" in world.last_diagnosis.evidence


@pytest.mark.parametrize(("first", "second"), [("", "no ptrace"), ("no ptrace", ""), ("no ptrace", "no ptrace")])
def test_what_either_look_could_not_see_was_not_compared_and_confirms_nothing(first: str, second: str) -> None:
    world = suspected()
    world.send(taken(world.at, stack(), unobserved=first))
    world.watch(APART_S)
    world.send(taken(world.at, stack(), stack(9), unobserved=second))
    assert unseen(world) == "no ptrace"
    assert isinstance(world.state, Starting)
    world.watch(60.0)
    assert isinstance(world.state, Killing)


def test_what_little_is_seen_clears_it_when_it_moves() -> None:
    world = loading()
    world.stacks, world.stacks_unobserved = working, "no ptrace of 71"
    world.watch(2 * UNCONFIRMED_FACTOR * PATIENCE_S)
    assert isinstance(world.state, Starting)
    assert world.announced("engine.cleared")
    assert world.announced("stacks.inconclusive") == []


def test_an_engine_that_moves_while_nobody_can_see_its_stacks_is_cleared() -> None:
    world = loading(BASE, look_at_stacks=False).watch(PATIENCE_S + 4.0)
    assert doubt(world) is not None
    world.say("something new").watch(0.5)
    assert doubt(world) is None


def test_a_patience_that_grows_takes_the_suspicion_back() -> None:
    world = suspected()
    world.send(GpusUnobserved(at=world.at, attempt=1, reason="NVML did not answer"))
    world.watch(0.5, lambda _: world.look(gpus=()))
    assert doubt(world) is None


# -- the parts -------------------------------------------------------------------------------------------------------


def test_a_look_is_due_first_at_once_and_then_so_long_after_the_first() -> None:
    raised = suspicion.raised(10.0, may_look=True)
    assert suspicion.look_is_due(raised, 10.0)
    under_way = suspicion.asked(raised, 10.0)
    assert not suspicion.look_is_due(under_way, 99.0)
    seen = suspicion.after_look(under_way, taken(11.0, stack()))
    assert not suspicion.look_is_due(seen, 11.0 + APART_S - 0.1)
    assert suspicion.look_is_due(seen, 11.0 + APART_S)
    assert not suspicion.look_is_due(suspicion.raised(10.0, may_look=False), 99.0)


def test_a_look_is_late_by_quiet_and_another_one_is_taken_later() -> None:
    under_way = suspicion.asked(suspicion.raised(10.0, may_look=True), 8.0)
    assert suspicion.after_waiting(under_way, 8.0 + LATE_S, 999.0) == under_way, "time that nobody observed is none"
    late = suspicion.after_waiting(under_way, 8.1 + LATE_S, 20.0)
    assert (late.finding, late.blind) == (Finding.BLIND, "no answer within 7 s")
    assert suspicion.after_look(late, taken(21.0, stack())) == late, "a look that comes after all is not trusted"
    assert not suspicion.look_is_due(late, 20.0 + AGAIN_S - 0.1)
    assert suspicion.look_is_due(late, 20.0 + AGAIN_S)
    resting = suspicion.raised(10.0, may_look=True)
    assert suspicion.after_waiting(resting, 99.0, 99.0) == resting


def test_a_look_that_was_not_asked_for_is_not_the_second() -> None:
    first = suspicion.after_look(suspicion.asked(suspicion.raised(0.0, may_look=True), 0.0), taken(0.1, stack()))
    assert suspicion.after_look(first, taken(0.2, stack())) == first


def test_a_worker_that_spins_while_its_stacks_stand_still_is_confirmed_all_the_same() -> None:
    world = loading()
    world.watch(60.0, lambda passed_s: world.look(worker(cpu_s=20.0 + passed_s)))
    assert isinstance(world.state, Killing)
    assert "stacks: two looks found every thread in the same place" in world.last_diagnosis.evidence
