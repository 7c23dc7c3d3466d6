"""What a host's own starts teach: how long quiet may last, and what each start leaves behind for the next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import stall
from mgpu_llm.core.effects import RememberStart
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.history import PastStart
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.launch import Server
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, LONGEST_LEARNT_S
from mgpu_llm.core.states import Policy, Starting
from tests.core.looks import CONFIRMED_S, working
from tests.core.world import ASSIGNED, NCCL, ON_CPU, UP, World, loading, policy, seconds_to_the_verdict, worker

FLOOR_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]


def past(quiet_s: float, phase: str = "distributed-init") -> PastStart:
    return PastStart(
        launch="k",
        model="/m",
        at="2026-11-24T21:05:00Z",
        duration_s=99.0,
        phase_s={phase: 50.0},
        quiet_s={phase: quiet_s},
    )


def learning(*starts: PastStart, factor: float | None = 5.0) -> Policy:
    return policy(past=starts, learn_factor=factor)


@pytest.mark.parametrize(
    ("quiet_s", "factor", "allowed_s"),
    [
        (4.0, 5.0, 20.0),
        (1.6, 5.0, FLOOR_S),
        (1.7, 5.0, 8.5),
        (0.0, 5.0, FLOOR_S),
        (4.0, 1.5, FLOOR_S),
        (10.0, 1.5, 15.0),
        (119.0, 5.0, 595.0),
        (500.0, 5.0, LONGEST_LEARNT_S),
    ],
)
def test_patience_is_so_many_times_the_longest_quiet_between_the_floor_and_the_ceiling(
    quiet_s: float, factor: float, allowed_s: float
) -> None:
    allowed = learning(past(quiet_s), factor=factor).allowed
    assert allowed[Phase.DISTRIBUTED_INIT] == pytest.approx(allowed_s)
    assert {phase: s for phase, s in allowed.items() if phase is not Phase.DISTRIBUTED_INIT} == {
        phase: s for phase, s in DEFAULT_PATIENCE_S.items() if phase is not Phase.DISTRIBUTED_INIT
    }


def test_the_ceiling_is_for_what_is_learnt_and_not_for_what_the_admin_wants() -> None:
    assert stall.learnt({Phase.BOOT: 900.0}, {Phase.BOOT: 500.0}, 5.0) == {Phase.BOOT: 900.0}


def test_the_longest_quiet_of_all_starts_counts_whatever_their_launch() -> None:
    starts = (past(3.0), replace(past(4.0), launch="another"), past(2.0))
    assert learning(*starts).allowed[Phase.DISTRIBUTED_INIT] == 20.0


def test_a_host_without_a_past_has_the_patience_of_the_config() -> None:
    assert learning().allowed == DEFAULT_PATIENCE_S


def test_who_does_not_want_it_learns_nothing() -> None:
    assert learning(past(100.0), factor=None).allowed == DEFAULT_PATIENCE_S


def test_a_phase_of_another_version_teaches_nothing() -> None:
    assert learning(past(100.0, "of-another-version")).allowed == DEFAULT_PATIENCE_S


@pytest.mark.parametrize(("quiet_s", "verdict_s"), [(4.0, 20.0), (1.0, FLOOR_S)])
def test_a_hang_on_a_host_whose_starts_are_quiet_is_called_one_that_much_later(
    quiet_s: float, verdict_s: float
) -> None:
    world = loading(past=(past(quiet_s),))
    assert seconds_to_the_verdict(world) == pytest.approx(verdict_s + CONFIRMED_S, abs=1.0)


def test_an_engine_that_says_nothing_known_gets_the_longest_patience_that_was_learnt() -> None:
    silent = World(policy=policy(past=(past(10.0, "compile"),))).start().look()
    assert seconds_to_the_verdict(silent) == pytest.approx(50.0 + CONFIRMED_S, abs=1.0)


# -- what is left behind ---------------------------------------------------------------------------------------------


def test_a_start_that_comes_to_service_leaves_how_long_its_phases_took_and_how_quiet_they_were() -> None:
    known = policy(ON_CPU, server=Server(command=("vllm", "serve"), model="/m"))
    world = World(policy=known).start().look()
    world.watch(2.0, lambda passed_s: world.look(worker(major_faults=int(passed_s * 100))))
    world.say(NCCL).watch(3.0)
    world.say(ASSIGNED).watch(1.0)
    world.watch(1.0, lambda passed_s: world.look(worker(major_faults=int(passed_s * 100))))
    world.say(UP).watch(0.5)
    world.serve()
    (remembered,) = world.all(RememberStart)
    assert remembered.launch == known.history_key(BASE)
    assert remembered.duration_s == 7.5
    assert remembered.phase_s == {"boot": 2.0, "distributed-init": 3.0, "weights": 2.0, "api": 0.5}
    assert sum(remembered.phase_s.values()) == remembered.duration_s
    assert remembered.quiet_s == {"distributed-init": 3.0, "weights": 1.0, "api": 0.5}


def test_a_start_without_a_key_is_remembered_under_none() -> None:
    world = loading().say(UP).serve()
    assert [start.launch for start in world.all(RememberStart)] == [""]


def test_a_start_that_fails_teaches_nothing() -> None:
    world = loading().watch(60.0)
    world.gone().exits(1)
    assert world.all(RememberStart) == []


def test_of_a_quiet_that_stacks_have_cleared_only_what_came_before_is_remembered() -> None:
    world = loading(ON_CPU)
    world.stacks = working
    world.watch(12.0)
    assert isinstance(world.state, Starting)
    world.say(UP).serve()
    (remembered,) = world.all(RememberStart)
    assert remembered.quiet_s["distributed-init"] == pytest.approx(10.0)
