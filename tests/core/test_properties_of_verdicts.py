"""No order of events brings a verdict too soon, and what was recorded of a load is judged as the load was."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.core import recording, replay, stall, suspicion
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Announce
from mgpu_llm.core.events import Stack
from mgpu_llm.core.history import PastStart
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.states import Fail, Killing, Policy, Starting, Try
from tests.core.loads import LOADS, Move, Told, many
from tests.core.looks import still, unanswered, working
from tests.core.world import BASE, ON_CPU, policy

TAUGHT = PastStart(
    launch="k",
    model="/m",
    at="2026-11-24T21:05:00Z",
    duration_s=99.0,
    phase_s={},
    quiet_s={"distributed-init": 2.5, "boot": 6.5},
)
POLICIES = st.builds(
    lambda launch, **changes: policy(launch, **changes),
    st.sampled_from((BASE, ON_CPU)),
    look_at_stacks=st.sampled_from((True, True, False)),
    past=st.sampled_from(((), (TAUGHT,))),
    attempts=st.integers(1, 5),
    crashes_per_rung=st.integers(1, 3),
    backoff_s=st.sampled_from((0.5, 2.0)),
    weights_bytes=st.sampled_from((None, 1 << 30)),
)


def begun(judged_by: Policy, crashes: int) -> Told:
    """A load of which so many attempts have crashed before, as far as the policy lets them."""
    world = Told(policy=judged_by)
    world.start()
    for _ in range(min(crashes, judged_by.attempts - 1)):
        world.exits(1).gone()
        if not isinstance(world.state, Starting):
            world.wait_out_backoff()
    return world


def needed_s(world: Told, patience_s: float, *, failed: bool) -> float:
    """How much quiet the verdict needs at least, by what it says that it rests on."""
    if failed:
        return patience_s
    evidence = " ".join(world.last_diagnosis.evidence)
    if "two looks found every thread in the same place" in evidence:
        return patience_s + suspicion.APART_S
    factor = stall.UNCONFIRMED_FACTOR if "stacks prove nothing" in evidence else stall.LONGEST_DOUBT_FACTOR
    return factor * patience_s


@many
@given(judged_by=POLICIES, moves=LOADS, answers=st.sampled_from((still, still, unanswered, working)))
def test_no_order_of_events_is_a_stall_before_the_patience_has_passed_since_the_last_movement(
    judged_by: Policy, moves: list[Move], answers: Callable[[int], tuple[Stack, ...] | None]
) -> None:
    world = begun(judged_by, 0)
    world.stacks = answers
    for move in moves:
        before = world.state
        assert isinstance(before, Starting)
        world.tell([move])
        if not isinstance(world.state, Starting):
            assert isinstance(world.state, Killing)
            has_gpus, failed = judged_by.ladder.base.gpus is not None, bool(before.clue.cause)
            around = stall.Circumstances(has_gpus=has_gpus, failed=failed)
            patience_s = stall.patience_now(before.progress, judged_by.allowed, around)
            assert world.at - world.moved_at >= needed_s(world, patience_s, failed=failed)
            return


def decision_in_words(world: Told, rung: Rung) -> str | None:
    """What the live supervisor does next, as a report tells it."""
    if not isinstance(world.state, Killing):
        return None
    match world.state.then:
        case Try(rung=then, delay_s=delay_s) if then == rung:
            return f"try again on rung {then.name} after {round(delay_s, 1):g} s"
        case Try(rung=then):
            return f"step to rung {then.name}"
        case Fail(status=status):
            return f"give up (exit status {status})"
        case _:
            return None


OUTCOMES = {"stalled": "stalled", "crashed": "crashed", "refused": "crashed"}
ENDS = st.sampled_from((None, None, 0, 1, -9))


@many
@given(judged_by=POLICIES, moves=LOADS, status=ENDS, crashes=st.sampled_from((0, 0, 1, 2)))
def test_a_load_that_was_recorded_is_judged_as_it_was_when_it_lived(
    judged_by: Policy, moves: list[Move], status: int | None, crashes: int
) -> None:
    world = begun(judged_by, crashes)
    assert isinstance(world.state, Starting)
    spawned_at, rung = world.state.since, world.state.run.rung
    told_before = len(world.effects)
    world.stacks = unanswered  # those that come are moves of their own
    world.tell(moves)
    if status is not None and isinstance(world.state, Starting):
        world.exits(status)
    live: Diagnosis | None = world.verdict
    recorded = recording.read(json.dumps(row) for row in world.rows)
    report = replay.judge(recorded)
    if live is None:
        assert isinstance(world.state, Starting)
        assert report.verdict_at is None
        assert (report.outcome == "crashed") == bool(world.state.clue.cause)
        if report.outcome == "running":
            assert (report.phase, report.decision) == (world.state.progress.phase.label, None)
            assert report.last_progress_at == world.state.progress.last_moved_at - spawned_at
    else:
        assert (report.outcome, report.cause) == (OUTCOMES[live.outcome], live.cause)
        assert (report.summary, report.advice, report.evidence) == (live.summary, live.advice, live.evidence)
        assert report.verdict_at == report.ended_at == world.at - spawned_at
        assert report.decision == decision_in_words(world, rung)
    suspected = [e for e in world.effects[told_before:] if isinstance(e, Announce) and e.name == "engine.suspected"]
    assert len(report.suspicions) == len(suspected)
    assert replay.judge(recorded, judged_by) == report, "its header says all that the judgement depends on"
