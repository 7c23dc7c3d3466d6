from __future__ import annotations

from typing import get_args

import pytest

from mgpu_llm.core.events import Event
from mgpu_llm.core.states import (
    Anew,
    Fail,
    Killing,
    Rest,
    State,
    Try,
)
from mgpu_llm.core.supervisor import step
from tests.core.everything import EVENTS, POLICY, STATES, check


def test_the_states_and_events_tried_here_are_all_there_are() -> None:
    assert {type(state) for state in STATES} == set(get_args(State))
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    assert {type(state.then) for state in STATES if isinstance(state, Killing)} == {Try, Anew, Rest, Fail}


@pytest.mark.parametrize("state", STATES, ids=lambda state: type(state).__name__)
def test_no_event_in_any_state_raises_or_breaks_a_rule(state: State) -> None:
    for event in EVENTS:
        after, effects = step(state, event, POLICY)
        check(state, event, after, effects)
