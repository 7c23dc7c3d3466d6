"""A recording of a load whose rules were changed meanwhile is judged by each in its time."""

from __future__ import annotations

import json

import pytest

from mgpu_llm.core import recorded_policy
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.ladder import Ladder
from mgpu_llm.core.recording import Recording, RecordingError, Row, cut
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.replay import judge
from mgpu_llm.core.states import Policy, Run
from tests.core.test_replay import HUNG, recorded
from tests.core.world import BASE, policy

FIRST = Run(attempt=1, tries=1)
#: Nobody looks at stacks, so the verdict is due when patience and the wait for an answer are over.
PATIENT = policy(patience=dict.fromkeys(Phase, 50.0))
SHORT = policy(patience=dict.fromkeys(Phase, 8.0))


def begun(under: Policy) -> Row:
    return back(recorded_policy.header(under, FIRST))


def reloaded(under: Policy, t: float) -> Row:
    return back(recorded_policy.reloaded(under, FIRST, t))


def back(row: Row) -> Row:
    """As it comes back from a file."""
    read: Row = json.loads(json.dumps(row))
    return read


def hung(*rows: Row) -> Recording:
    return recorded(*HUNG, *rows, header=begun(PATIENT))


def test_a_patience_that_was_shortened_ends_the_hang_after_the_reload_and_not_before() -> None:
    assert judge(hung()).outcome == "running"
    report = judge(hung(reloaded(SHORT, 30.25)))
    assert (report.outcome, report.suspicions[0].at_s) == ("stalled", 30.5)
    assert report.phases[-1].patience_s == 8.0


def test_the_decision_is_that_of_the_rules_that_held_at_the_end() -> None:
    stays = policy(BASE, patience=SHORT.patience, ladder=Ladder(base=BASE, areas=frozenset({Area.GPUS}), sizes=(1,)))
    assert judge(hung(reloaded(SHORT, 20.25))).decision == "step to rung p2p-off"
    assert judge(hung(reloaded(SHORT, 20.25), reloaded(stays, 20.3))).decision != "step to rung p2p-off"


def test_rules_that_are_given_hold_throughout() -> None:
    assert judge(hung(reloaded(SHORT, 20.25)), PATIENT).outcome == "running"


def test_a_row_of_rules_is_read_as_a_first_row_is() -> None:
    assert recorded_policy.policy_from(hung(), reloaded(SHORT, 3.0)) == recorded_policy.policy_of(cut([begun(SHORT)]))


def test_a_broken_row_of_rules_is_named() -> None:
    with pytest.raises(RecordingError, match=r"^the policy row at t=3.0 is broken: "):
        judge(hung({**reloaded(SHORT, 3.0), "attempts": "many"}))
