"""Which areas of the settings are in use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import in_use, remedies
from mgpu_llm.core.diagnosis import Clue, of_exit
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.states import Backoff, Killing, Rest, Run, State, Stopped, Terminating, Try
from tests.core.world import P2P_OFF, failed

ON_P2P_OFF = Run(attempt=2, rung=P2P_OFF)
LESS = Rung(remedies=(remedies.utilisation(0.8, raises=False),))


@pytest.mark.parametrize(
    ("state", "areas"),
    [
        (Stopped(), set()),
        (Stopped(run=ON_P2P_OFF), {Area.TRANSPORTS}),
        (Stopped(run=Run(trial=P2P_OFF)), {Area.TRANSPORTS}),
        (Backoff(run=Run(), rung=LESS, until=1.0), {Area.UTILISATION}),
        (
            Killing(run=ON_P2P_OFF, since=0.0, then=Try(rung=LESS, delay_s=0.0), why=""),
            {Area.TRANSPORTS, Area.UTILISATION},
        ),
        (Killing(run=ON_P2P_OFF, since=0.0, then=Rest(final=False), why=""), {Area.TRANSPORTS}),
        (Terminating(run=Run(), deadline=0.0, then=Try(rung=P2P_OFF, delay_s=0.0), why=""), {Area.TRANSPORTS}),
    ],
)
def test_the_rung_and_the_next_one_and_the_one_to_go_back_to_are_in_use(state: State, areas: set[Area]) -> None:
    assert in_use.areas(state) == areas


def test_what_failed_in_this_row_counts_for_the_next_decision_and_what_failed_before_does_not() -> None:
    found = of_exit(1, Phase.WEIGHTS, Clue(), retries=0)
    run = Run(attempt=3, rung=BASE, tries=3, ended=failed(found, P2P_OFF, LESS))
    assert in_use.areas(Stopped(run=run)) == {Area.TRANSPORTS, Area.UTILISATION}
    assert in_use.areas(Stopped(run=replace(run, tries=1))) == {Area.UTILISATION}
