from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mgpu_llm.core import decision
from mgpu_llm.core.backoff import delay_s
from mgpu_llm.core.decision import after_death, after_failed_load, begun, final_message, in_words
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.remedies import BY_DEFAULT, DEFAULT_ORDER, Area, Want
from mgpu_llm.core.states import Anew, Ended, Fail, Policy, Rest, Run, Try
from tests.core.world import P2P_OFF, failed, policy, rungs

POLICY = policy()
LAST = rungs(POLICY)[-1]
CRASH = Diagnosis(
    cause="engine-exited",
    outcome="crashed",
    summary="it ended",
    advice="read the log",
    wants=(Want.PLAIN_RETRY, *DEFAULT_ORDER),
)
DEATH = replace(CRASH, cause="died-while-serving", outcome="died", summary="it died", wants=DEFAULT_ORDER)
MEMORY = replace(CRASH, cause="cuda-out-of-memory", wants=(Want.MEMORY_LOWER,))
REFUSED = replace(CRASH, cause="bad-arguments", wants=(Want.STOP,))


def ended(number: int, diagnosis: Diagnosis | None = CRASH, rung: Rung = BASE) -> Ended:
    outcome = diagnosis.outcome if diagnosis else "stopped"
    return Ended(
        number=number, rung=rung, outcome=outcome, phase="boot", ended_at=9.0, duration_s=61.4, diagnosis=diagnosis
    )


def run(*on: Rung, found: Diagnosis = CRASH, **changes: object) -> Run:
    """A run whose attempts on these rungs have all failed so, the last one just now."""
    on = on or (BASE,)
    whole = Run(attempt=len(on), rung=on[-1], tries=len(on), ended=failed(found, *on))
    return replace(whole, **changes)  # type: ignore[arg-type]


def status(then: object) -> int:
    assert isinstance(then, Fail)
    return then.status


def message(then: object) -> str:
    assert isinstance(then, Fail)
    return then.message


# -- the pause ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "waited"), [(0, 2.0), (1, 2.0), (2, 4.0), (3, 8.0), (5, 32.0), (6, 60.0), (10_000, 60.0)]
)
def test_each_failure_in_a_row_doubles_the_wait_up_to_the_ceiling(failures: int, waited: float) -> None:
    assert delay_s(failures, first_s=2.0, ceiling_s=60.0) == waited


def test_no_wait_stays_no_wait() -> None:
    assert delay_s(5, first_s=0.0, ceiling_s=60.0, jitter=1.0, seed="x") == 0.0


def test_jitter_makes_the_wait_longer_by_up_to_its_part_and_is_the_same_for_the_same_seed() -> None:
    waits = [delay_s(1, first_s=2.0, ceiling_s=60.0, jitter=0.25, seed=str(seed)) for seed in range(200)]
    assert all(2.0 <= wait < 2.5 for wait in waits)
    assert len(set(waits)) == 200
    assert max(waits) - min(waits) > 0.4
    assert waits == [delay_s(1, first_s=2.0, ceiling_s=60.0, jitter=0.25, seed=str(seed)) for seed in range(200)]


def test_every_daemon_and_every_attempt_draws_its_own_wait() -> None:
    seeds = [(replace(POLICY, backoff_jitter=0.5, seed=seed), attempt) for seed in range(3) for attempt in range(3)]
    waits = {after_failed_load(run(attempt=attempt), policy).delay_s for policy, attempt in seeds}  # type: ignore[union-attr]
    assert len(waits) == 9


# -- a load that failed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rung", "expected"), [(BASE, 65), (P2P_OFF, 69), (LAST, 69)])
def test_what_is_hopeless_is_not_tried_again_and_is_the_admins_mistake_only_on_the_base_rung(
    rung: Rung, expected: int
) -> None:
    then = after_failed_load(run(rung, found=REFUSED), POLICY)
    assert status(then) == expected
    assert "no retry can help" in message(then)


def test_a_plain_retry_waits_and_stays_on_its_rung() -> None:
    assert after_failed_load(run(P2P_OFF), POLICY) == Try(rung=P2P_OFF, delay_s=2.0)


def test_plain_retries_on_one_rung_wait_longer_each_time() -> None:
    patient = replace(CRASH, wants=(Want.PLAIN_RETRY,) * 5)
    waits = [after_failed_load(run(*[BASE] * count, found=patient), POLICY) for count in range(1, 5)]
    assert [then.delay_s for then in waits if isinstance(then, Try)] == [2.0, 4.0, 8.0, 16.0]


def test_once_the_plain_retries_are_used_the_settings_are_changed_at_once() -> None:
    assert after_failed_load(run(BASE, BASE), POLICY) == Try(rung=P2P_OFF, delay_s=0.0)
    then = after_failed_load(run(found=MEMORY), POLICY)
    assert isinstance(then, Try)
    assert (then.rung.name, then.delay_s) == ("utilisation-0.85", 0.0)


def test_another_cause_on_the_same_rung_has_tries_of_its_own() -> None:
    other = replace(CRASH, cause="worker-died")
    mixed = run(BASE, BASE, ended=(*failed(other, BASE), ended(2)))
    assert after_failed_load(mixed, POLICY) == Try(rung=BASE, delay_s=4.0)


def test_that_it_has_served_since_clears_what_failed_before() -> None:
    earlier = run(BASE, BASE, tries=1)
    assert after_failed_load(earlier, POLICY) == Try(rung=BASE, delay_s=2.0)


def test_a_spent_ladder_is_given_up() -> None:
    then = after_failed_load(run(LAST, found=replace(CRASH, wants=DEFAULT_ORDER)), POLICY)
    assert status(then) == 69
    assert "no rung left that could help" in message(then)


def test_a_known_cause_that_nothing_may_be_tried_against_is_for_the_admin_and_says_what_was_not_tried() -> None:
    pinned = replace(POLICY, ladder=replace(POLICY.ladder, areas=BY_DEFAULT - {Area.UTILISATION}))
    then = after_failed_load(run(found=MEMORY), pinned)
    assert status(then) == 65
    assert (
        'what could help is not allowed; not tried: less memory utilisation (ladder.pin names "utilisation"); attempt 1'
        in message(then)
    )
    tried = after_failed_load(run(LAST, found=MEMORY), POLICY)
    assert status(tried) == 69
    assert "not tried: less memory utilisation (0.8 is as low as may be)" in message(tried)


def test_a_cause_that_nobody_knows_is_not_the_admins_mistake_where_nothing_may_be_tried() -> None:
    frozen = replace(POLICY, ladder=replace(POLICY.ladder, areas=frozenset()))
    assert status(after_failed_load(run(found=replace(CRASH, wants=DEFAULT_ORDER)), frozen)) == 69
    retried = replace(CRASH, cause="worker-killed", wants=(Want.PLAIN_RETRY,))
    assert status(after_failed_load(run(BASE, BASE, found=retried), frozen)) == 69


def test_what_would_change_nothing_is_not_told() -> None:
    then = after_failed_load(run(P2P_OFF, found=replace(CRASH, cause="x", wants=(Want.TRANSPORT,))), POLICY)
    assert "not tried" not in message(then)


def test_the_number_of_attempts_is_a_limit_that_no_change_of_causes_resets() -> None:
    causes = [replace(CRASH, cause=name) for name in "ab" * 20]
    held = run(
        *[BASE] * 12,
        struggle=12,
        ended=tuple(ended(number, cause) for number, cause in enumerate(causes[:12], start=1)),
    )
    then = after_failed_load(held, replace(POLICY, attempts=12))
    assert status(then) == 69
    assert "12 attempts in a row have failed or died soon" in message(then)


def test_one_cause_has_a_limit_of_its_own() -> None:
    patient = replace(CRASH, wants=(Want.PLAIN_RETRY,) * 50)
    few = replace(POLICY, tries_per_cause=3)
    assert isinstance(after_failed_load(run(*[BASE] * 2, found=patient), few), Try)
    then = after_failed_load(run(*[BASE] * 3, found=patient), few)
    assert status(then) == 69
    assert "3 attempts have failed for the same cause" in message(then)


@pytest.mark.parametrize("causes", ["a", "ab", "abc", "aab"])
@pytest.mark.parametrize("made_so", [POLICY, policy(attempts=30, tries_per_cause=30)])
def test_whatever_fails_and_however_the_causes_alternate_it_ends(causes: str, made_so: Policy) -> None:
    now, names = Run(), list[str]()
    then: object = Try(rung=BASE, delay_s=0.0)
    while isinstance(then, Try):
        now = begun(now, then.rung)
        cause = replace(CRASH, cause=causes[now.tries % len(causes)])
        now = now.closed(ended(now.attempt, cause, now.rung))
        names.append(now.rung.name)
        then = after_failed_load(now, made_so)
    assert status(then) == 69
    assert len(names) <= made_so.attempts
    changed = [name for name, before in pairwise([*names[1:], ""]) if name != before]
    assert len(changed) == len(set(changed)), "no rung comes back"


# -- a rung that was only tried ----------------------------------------------------------------------------------------


def test_a_rung_that_was_only_tried_gives_way_to_the_one_that_served() -> None:
    tried = run(trial=P2P_OFF, found=REFUSED)
    then = after_failed_load(tried, POLICY)
    assert then == Try(rung=P2P_OFF, delay_s=0.0)
    assert in_words(then, tried) == "go back to rung p2p-off, which served before"


# -- deaths ------------------------------------------------------------------------------------------------------------


def dead(times: int, on: Rung = BASE, found: Diagnosis = DEATH) -> Run:
    return run(*[on] * times, found=found, deaths=times, tries=0)


def test_deaths_below_the_limit_wait_longer_each_time() -> None:
    assert after_death(dead(1), POLICY) == Try(rung=BASE, delay_s=2.0)
    assert after_death(dead(2), POLICY) == Try(rung=BASE, delay_s=4.0)
    assert after_death(dead(3), POLICY) == Try(rung=P2P_OFF, delay_s=0.0)


def test_at_the_limit_of_deaths_their_cause_chooses_the_rung() -> None:
    memory = replace(DEATH, wants=(Want.PLAIN_RETRY, Want.MEMORY_LOWER))
    assert after_death(dead(2, found=memory), POLICY) == Try(rung=BASE, delay_s=4.0)
    then = after_death(dead(3, found=memory), POLICY)
    assert isinstance(then, Try)
    assert then.rung.name == "utilisation-0.85"
    spent = after_death(dead(3, LAST, memory), POLICY)
    assert status(spent) == 69
    assert "the engine died 3 times while serving; not tried: less memory utilisation" in message(spent)


# -- the books ---------------------------------------------------------------------------------------------------------


def test_attempts_are_counted_in_all_and_in_a_row() -> None:
    first = begun(Run(), BASE)
    assert (first.attempt, first.tries, first.rung) == (1, 1, BASE)
    lower = begun(begun(first, BASE), P2P_OFF)
    assert (lower.attempt, lower.tries, lower.rung) == (3, 3, P2P_OFF)
    served = begun(replace(lower, tries=0), P2P_OFF)
    assert (served.attempt, served.tries) == (4, 1)


@pytest.mark.parametrize("then", [None, Rest(final=True), Anew()])
def test_what_somebody_else_decided_is_not_put_in_words(then: Rest | Anew | None) -> None:
    assert in_words(then, Run()) == ""


def test_a_decision_is_told_in_words() -> None:
    assert in_words(Try(rung=BASE, delay_s=2.345), Run()) == "try again on rung base after 2.3 s"
    assert in_words(Try(rung=P2P_OFF, delay_s=0.0), Run()) == "step to rung p2p-off"
    assert in_words(Fail(status=69, message="m"), Run()) == "give up (exit status 69)"


def test_the_last_word_names_the_failed_attempts_and_each_advice_once() -> None:
    other = replace(CRASH, summary="it stalled", advice="look at the disk")
    told = final_message(run(tries=3), "nothing helped")
    assert told == "gave up: nothing helped; attempt 1 (base, 61 s): it ended. What to do: read the log"
    many = replace(run(tries=3), ended=(ended(1), ended(2), ended(3, None), ended(4, other, P2P_OFF)))
    assert final_message(many, "nothing helped") == (
        "gave up: nothing helped; attempts 1, 2 (base, 61 s): it ended; "
        "attempt 4 (p2p-off, 61 s): it stalled. What to do: read the log / look at the disk"
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
    assert told.startswith("gave up: no; attempt 2 (base, 61 s): it died; attempts 3, 4 (base, 61 s): it ended. ")


def test_a_last_word_without_a_failed_attempt_has_no_advice() -> None:
    assert "What to do" not in final_message(Run(), "nobody knows")
    assert decision.failed_in_a_row(Run()) == ()
