from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core.backoff import delay_s
from mgpu_llm.core.decision import after_death, after_failed_load, begun, final_message
from mgpu_llm.core.diagnosis import ANY_RUNG, NO_RUNG, Diagnosis
from mgpu_llm.core.ladder import Kind
from mgpu_llm.core.states import Ended, Fail, Run, Try
from tests.core.world import policy

POLICY = policy()
LAST = len(POLICY.rungs) - 1
CRASH = Diagnosis(cause="engine-exited", outcome="crashed", summary="it ended", advice="read the log", plain_retries=1)


def ended(number: int, diagnosis: Diagnosis | None = CRASH) -> Ended:
    outcome = diagnosis.outcome if diagnosis else "stopped"
    return Ended(
        number=number, rung="base", outcome=outcome, phase="boot", ended_at=9.0, duration_s=61.4, diagnosis=diagnosis
    )


def run(**changes: int) -> Run:
    return replace(Run(attempt=1, rung=0, tries=1, tries_on_rung=1, ended=(ended(1),)), **changes)  # type: ignore[arg-type]


DEATH = replace(CRASH, cause="died-while-serving", outcome="died", summary="it died", plain_retries=0)


@pytest.mark.parametrize(
    ("failures", "waited"), [(0, 2.0), (1, 2.0), (2, 4.0), (3, 8.0), (5, 32.0), (6, 60.0), (10_000, 60.0)]
)
def test_each_failure_in_a_row_doubles_the_wait_up_to_the_ceiling(failures: int, waited: float) -> None:
    assert delay_s(failures, first_s=2.0, ceiling_s=60.0) == waited


def test_no_wait_stays_no_wait() -> None:
    assert delay_s(5, first_s=0.0, ceiling_s=60.0) == 0.0


@pytest.mark.parametrize(("rung", "status"), [(0, 65), (1, 69), (LAST, 69)])
def test_what_is_hopeless_is_not_tried_again_and_is_the_admins_mistake_only_on_the_base_rung(
    rung: int, status: int
) -> None:
    then = after_failed_load(run(rung=rung), replace(CRASH, hopeless=True), POLICY)
    assert isinstance(then, Fail)
    assert then.status == status
    assert "no retry can help" in then.message


def test_a_plain_retry_waits_and_stays_on_its_rung() -> None:
    assert after_failed_load(run(rung=2), CRASH, POLICY) == Try(rung=2, delay_s=2.0)


def test_once_the_plain_retries_are_used_the_next_rung_that_cures_is_tried_at_once() -> None:
    assert after_failed_load(run(tries_on_rung=2), CRASH, POLICY) == Try(rung=1, delay_s=0.0)
    memory = replace(CRASH, plain_retries=0, cures=frozenset({Kind.MEMORY}))
    assert after_failed_load(run(), memory, POLICY) == Try(rung=2, delay_s=0.0)


@pytest.mark.parametrize(("rung", "cures"), [(LAST, ANY_RUNG), (0, NO_RUNG)])
def test_without_a_rung_that_could_help_it_is_given_up(rung: int, cures: frozenset[Kind]) -> None:
    then = after_failed_load(run(rung=rung), replace(CRASH, plain_retries=0, cures=cures), POLICY)
    assert isinstance(then, Fail)
    assert then.status == 69
    assert "no rung left that could help" in then.message


def test_the_number_of_attempts_is_a_limit_of_its_own() -> None:
    then = after_failed_load(run(tries=POLICY.attempts), CRASH, POLICY)
    assert isinstance(then, Fail)
    assert then.status == 69
    assert f"{POLICY.attempts} attempts in a row have failed" in then.message


def test_deaths_below_the_limit_wait_longer_each_time() -> None:
    assert after_death(run(deaths=1), DEATH, POLICY) == Try(rung=0, delay_s=2.0)
    assert after_death(run(deaths=2), DEATH, POLICY) == Try(rung=0, delay_s=4.0)
    assert after_death(run(deaths=3), DEATH, POLICY) == Try(rung=1, delay_s=0.0)


def test_at_the_limit_of_deaths_their_cause_chooses_the_rung() -> None:
    memory = replace(DEATH, cures=frozenset({Kind.MEMORY}))
    assert after_death(run(deaths=2), memory, POLICY) == Try(rung=0, delay_s=4.0)
    assert after_death(run(deaths=3), memory, POLICY) == Try(rung=2, delay_s=0.0)
    assert isinstance(after_death(run(deaths=3, rung=3), memory, POLICY), Fail)


def test_attempts_are_counted_in_all_in_a_row_and_on_their_rung() -> None:
    first = begun(Run(), 0)
    assert (first.attempt, first.tries, first.tries_on_rung) == (1, 1, 1)
    again = begun(first, 0)
    assert (again.attempt, again.tries, again.tries_on_rung) == (2, 2, 2)
    lower = begun(again, 2)
    assert (lower.attempt, lower.rung, lower.tries, lower.tries_on_rung) == (3, 2, 3, 1)
    served = begun(replace(lower, tries=0, tries_on_rung=0), 2)
    assert (served.attempt, served.tries, served.tries_on_rung) == (4, 1, 1)


def test_the_last_word_names_the_failed_attempts_and_each_advice_once() -> None:
    other = replace(CRASH, summary="it stalled", advice="look at the disk")
    told = final_message(run(tries=3), "nothing helped")
    assert told == "gave up: nothing helped; attempt 1 (base, 61 s): it ended. What to do: read the log"
    many = replace(run(tries=3), ended=(ended(1), ended(2), ended(3, None), ended(4, other)))
    assert final_message(many, "nothing helped") == (
        "gave up: nothing helped; attempt 1 (base, 61 s): it ended; attempt 2 (base, 61 s): it ended; "
        "attempt 4 (base, 61 s): it stalled. What to do: read the log / look at the disk"
    )


def test_attempts_from_before_the_engine_served_are_not_in_the_last_word() -> None:
    told = final_message(replace(run(tries=1), ended=(ended(1), ended(2))), "nothing helped")
    assert "attempt 2" in told
    assert "attempt 1" not in told


def test_the_last_word_names_every_death_in_the_row_and_what_failed_between_them_and_nothing_before() -> None:
    told = replace(
        run(tries=0, deaths=2),
        ended=(ended(1, DEATH), ended(2), ended(3, DEATH), ended(4), ended(5, None), ended(6, DEATH)),
    )
    assert final_message(told, "it dies") == (
        "gave up: it dies; attempt 3 (base, 61 s): it died; attempt 4 (base, 61 s): it ended; "
        "attempt 6 (base, 61 s): it died. What to do: read the log"
    )
    all_three = final_message(replace(told, deaths=3), "it dies")
    assert [f"attempt {number} " in all_three for number in (1, 2, 3, 4, 5, 6)] == [True, True, True, True, False, True]


def test_the_last_word_after_deaths_names_the_failed_loads_since_then_too() -> None:
    told = final_message(replace(run(tries=2, deaths=1), ended=(ended(1), ended(2, DEATH), ended(3), ended(4))), "no")
    assert [f"attempt {number} " in told for number in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_last_word_without_a_failed_attempt_has_no_advice() -> None:
    assert "What to do" not in final_message(Run(), "nobody knows")
