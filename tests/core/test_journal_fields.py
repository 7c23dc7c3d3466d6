from __future__ import annotations

import re

import pytest

from mgpu_llm.core import journal_fields, whereabouts
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.states import Backoff, Checking, Ended, Failed, Killing, Ready, Rest, Run, Starting, State, Stopped
from tests.core.everything import HISTORY, LOADED
from tests.core.world import P2P_OFF, loading

OVER = Ended(number=4, rung=P2P_OFF, outcome="stopped", phase="weights", ended_at=9.0, duration_s=9.0, diagnosis=None)
RUN = Run(attempt=4, rung=P2P_OFF, ended=(*HISTORY, OVER))
HERE = {"attempt": 4, "rung": "p2p-off"}


def test_every_id_is_one_that_journald_takes_and_no_two_are_the_same() -> None:
    ids = list(journal_fields.MESSAGE_IDS.values())
    assert all(re.fullmatch("[0-9a-f]{32}", message_id) for message_id in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("fact", "field"),
    [
        ("cause", "MGPU_CAUSE"),
        ("retry_in_s", "MGPU_RETRY_IN_S"),
        ("odd-näme", "MGPU_ODD_N_ME"),
        ("x" * 99, "MGPU_" + "X" * 59),
    ],
)
def test_a_fact_is_a_field_whose_name_journald_takes(fact: str, field: str) -> None:
    assert journal_fields.field(fact) == field


@pytest.mark.parametrize(
    ("process", "rank"),
    [
        ("Worker_TP1", "1"),
        ("Worker_DP0_PP1_PCP0_TP3_DCP1_EP3", "3"),
        ("Worker_PP1", "0"),
        ("Worker", "0"),
        ("EngineCore_DP1", ""),
        ("APIServer", ""),
        ("Workers_TP1", ""),
        ("", ""),
    ],
)
def test_only_workers_have_a_rank(process: str, rank: str) -> None:
    assert journal_fields.rank(process) == rank


@pytest.mark.parametrize(
    ("state", "about"),
    [
        (Stopped(), {}),
        (Checking(run=RUN, since=1.0), {**HERE, "phase": "preflight"}),
        (Killing(run=RUN, since=1.0, then=Rest(final=True), why="asked"), {**HERE, "phase": "weights"}),
        (Backoff(run=RUN, rung=BASE, until=9.0), {**HERE, "phase": "weights"}),
        (Failed(run=Run(attempt=5, ended=HISTORY), status=69, message="gave up"), {"attempt": 5, "rung": "base"}),
        (Failed(run=Run(attempt=5), status=69, message="gave up"), {"attempt": 5, "rung": "base"}),
    ],
)
def test_a_line_is_about_the_attempt_and_the_last_phase_that_it_had_come_to(
    state: State, about: dict[str, object]
) -> None:
    assert whereabouts.of(state) == about


def test_a_line_during_the_load_and_while_it_serves_is_about_its_phase() -> None:
    state = loading().state
    assert isinstance(state, Starting)
    assert whereabouts.of(state) == {"attempt": 1, "rung": "base", "phase": state.progress.phase.label}
    assert isinstance(LOADED, Starting)
    ready = Ready(run=RUN, since=1.0, spawned_at=0.0, progress=LOADED.progress, pid=7)
    assert whereabouts.of(ready) == {**HERE, "phase": "serving"}
