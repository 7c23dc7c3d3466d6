"""What to do after an attempt has ended: try again, step down the ladder, or give up."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, assert_never

from mgpu_llm.core import ladder
from mgpu_llm.core.backoff import delay_s
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.states import Ended, Fail, Next, Policy, Rest, Run, Try

#: Exit statuses of the daemon, named in the unit's RestartPreventExitStatus. 65, 69, 70 and 78 follow sysexits.h.
DO_NOT_RETRY: Final = 65
GAVE_UP: Final = 69


def after_failed_load(run: Run, diagnosis: Diagnosis, policy: Policy) -> Next:
    """The engine never served. `run` has the ended attempt in its history already."""
    if diagnosis.hopeless:
        # On a rung of ours the admin's own settings had failed for another reason: that is giving up, not his mistake.
        status = DO_NOT_RETRY if run.rung == 0 else GAVE_UP
        return Fail(status=status, message=final_message(run, "no retry can help"))
    if run.tries >= policy.attempts:
        return Fail(status=GAVE_UP, message=final_message(run, f"{run.tries} attempts in a row have failed"))
    if run.tries_on_rung <= diagnosis.plain_retries:
        return Try(rung=run.rung, delay_s=_delay_s(run, policy))
    lower = ladder.next_rung(policy.rungs, run.rung, diagnosis.cures)
    if lower is None:
        return Fail(status=GAVE_UP, message=final_message(run, "the ladder has no rung left that could help"))
    # A rung is a change of settings, not a wait for something to recover: it is tried at once.
    return Try(rung=lower, delay_s=0.0)


def after_death(run: Run, diagnosis: Diagnosis, policy: Policy) -> Next:
    """The engine had served. `run.deaths` counts the deaths in a row, this one included."""
    if run.deaths < policy.deaths:
        return Try(
            rung=run.rung,
            delay_s=delay_s(run.deaths, first_s=policy.backoff_s, ceiling_s=policy.backoff_ceiling_s),
        )
    lower = ladder.next_rung(policy.rungs, run.rung, diagnosis.cures)
    if lower is None:
        return Fail(status=GAVE_UP, message=final_message(run, f"the engine died {run.deaths} times while serving"))
    return Try(rung=lower, delay_s=0.0)


def begun(run: Run, rung: int) -> Run:
    """The run with one more attempt on `rung`."""
    same = rung == run.rung and run.tries > 0
    return replace(
        run,
        attempt=run.attempt + 1,
        rung=rung,
        tries=run.tries + 1,
        tries_on_rung=run.tries_on_rung + 1 if same else 1,
    )


def final_message(run: Run, why: str) -> str:
    """The last word: why it is over, what was tried and why each attempt failed, and what to do."""
    failed = failed_in_a_row(run)
    told = [
        f"attempt {ended.number} ({ended.rung}, {ended.duration_s:.0f} s): {ended.diagnosis.summary}"
        for ended in failed
        if ended.diagnosis is not None
    ]
    advice = list(dict.fromkeys(ended.diagnosis.advice for ended in failed if ended.diagnosis is not None))
    return f"gave up: {why}; " + "; ".join(told) + (f". What to do: {' / '.join(advice)}" if advice else "")


def failed_in_a_row(run: Run) -> tuple[Ended, ...]:
    """The failed attempts that count: those since the engine last served, and all since the first death in this row."""
    failed = tuple(ended for ended in run.ended if ended.diagnosis is not None)
    deaths = [index for index, ended in enumerate(failed) if ended.outcome == "died"]
    in_a_row = deaths[-run.deaths :] if run.deaths else []
    return failed[max(0, min([len(failed) - max(run.tries, 1), *in_a_row])) :]


def in_words(then: Next | None, run: Run, policy: Policy) -> str:
    """What is done after an attempt of `run`, "" where somebody else decides."""
    match then:
        case Try(rung=rung) if rung == run.rung:
            return f"try again on rung {policy.rungs[rung].name} after {then.delay_s:g} s"
        case Try(rung=rung):
            return f"step down to rung {policy.rungs[rung].name}"
        case Fail():
            return f"give up (exit status {then.status})"
        case Rest() | None:
            return ""
        case _ as unreachable:
            assert_never(unreachable)


def _delay_s(run: Run, policy: Policy) -> float:
    return delay_s(run.tries_on_rung, first_s=policy.backoff_s, ceiling_s=policy.backoff_ceiling_s)
