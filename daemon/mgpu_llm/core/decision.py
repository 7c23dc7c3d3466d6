"""What to do after an attempt has ended: try again, change settings, or give up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import Final, assert_never

from mgpu_llm.core import cures
from mgpu_llm.core.backoff import delay_s
from mgpu_llm.core.case import Failure
from mgpu_llm.core.cures import Choice
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.remedies import DEFAULT_ORDER, Want
from mgpu_llm.core.states import Anew, Ended, Fail, Next, Policy, Rest, Run, Try

#: Exit statuses of the daemon, named in the unit's RestartPreventExitStatus. 65, 69, 70 and 78 follow sysexits.h.
DO_NOT_RETRY: Final = 65
GAVE_UP: Final = 69


def after_failed_load(run: Run, policy: Policy) -> Next:
    """The engine never served. `run` has the ended attempt, and why it failed, in its history already."""
    if run.trial is not None:
        # It was only to see whether the cause has gone; the rung that served before is still there.
        return Try(rung=run.trial, delay_s=0.0)
    failures = failures_since_it_served(run)
    found = failures[-1].found
    choice = cures.choose(policy.ladder, failures)
    on_rung = sum(failure.rung == run.rung for failure in failures)
    if found.spared and choice.remedy is None:
        # Who holds the GPU may go at any time, and nothing is lost by waiting.
        return Try(rung=run.rung, delay_s=_delay_s(on_rung, run, policy))
    same = Counter(failure.found.cause for failure in failures if not failure.found.spared)[found.cause]
    if choice.remedy is None and not choice.retry:
        return _nothing_left(run, failures, choice)
    if _loads(run) >= policy.attempts:
        return _too_many(run)
    if same >= policy.tries_per_cause:
        return Fail(status=GAVE_UP, message=final_message(run, f"{same} attempts have failed for the same cause"))
    if choice.remedy is None:
        return Try(rung=run.rung, delay_s=_delay_s(on_rung, run, policy))
    # Other settings are no wait for something to recover: they are tried at once.
    return Try(rung=run.rung.plus(choice.remedy), delay_s=0.0)


def after_death(run: Run, policy: Policy) -> Next:
    """The engine had served. `run.deaths` counts the deaths in a row, this one included."""
    if _loads(run) >= policy.attempts:
        return _too_many(run)
    failures = _failures(failed_in_a_row(run))
    gone = failures[-1].found.gpus  # without these it cannot be the same again
    if run.deaths < policy.deaths and not gone:
        return Try(rung=run.rung, delay_s=_delay_s(run.deaths, run, policy))
    choice = cures.choose(policy.ladder, failures, again=False)
    if choice.remedy is None:
        why = f"the engine died {run.deaths} times while serving"
        why = (f"nothing is left to serve it without GPU {', '.join(gone)}" if gone else why) + _not_tried(choice)
        return Fail(status=GAVE_UP, message=final_message(run, why))
    return Try(rung=run.rung.plus(choice.remedy), delay_s=0.0)


def deaths_carried_over(policy: Policy) -> int:
    """So many deaths count already when an engine that died too often goes on with other settings: that they do not help either
    needs fewer of them."""
    return min(1, policy.deaths - 1)


def begun(run: Run, rung: Rung) -> Run:
    """The run with one more attempt on `rung`."""
    return replace(run, attempt=run.attempt + 1, rung=rung, tries=run.tries + 1, struggle=run.struggle + 1)


def final_message(run: Run, why: str) -> str:
    """The last word: why it is over, what was tried and why each attempt failed, and what to do."""
    failed = [(ended, ended.diagnosis) for ended in failed_in_a_row(run) if ended.diagnosis is not None]
    told = list[str]()
    for (rung, summary), alike in groupby(failed, lambda one: (one[0].rung.name, one[1].summary)):
        told.append(f"{_attempts([ended for ended, _ in alike], rung)}: {summary}")
    advice = list(dict.fromkeys(found.advice for _, found in failed))
    return f"gave up: {why}; " + "; ".join(told) + (f". What to do: {' / '.join(advice)}" if advice else "")


def _attempts(alike: list[Ended], rung: str) -> str:
    first, last = alike[0], alike[-1]
    numbers, took_s = ", ".join(str(ended.number) for ended in alike), last.ended_at - first.ended_at + first.duration_s
    return f"attempt{'s' * (len(alike) > 1)} {numbers} ({rung}, {took_s:.0f} s)"


def failed_in_a_row(run: Run) -> tuple[Ended, ...]:
    """The failed attempts that count: those since the engine last served, and all since the first death in this row."""
    failed = tuple(ended for ended in run.ended if ended.diagnosis is not None)
    deaths = [index for index, ended in enumerate(failed) if ended.outcome == "died"]
    in_a_row = deaths[-run.deaths :] if run.deaths else []
    return failed[max(0, min([len(failed) - max(run.tries, 1), *in_a_row])) :]


def failures_since_it_served(run: Run) -> tuple[Failure, ...]:
    """The failures of the last `run.tries` attempts: that it served clears the settings of what failed before."""
    return _failures(failed_in_a_row(run))[-run.tries :]


def _failures(failed: tuple[Ended, ...]) -> tuple[Failure, ...]:
    return tuple(Failure(rung=ended.rung, found=ended.diagnosis) for ended in failed if ended.diagnosis is not None)


def in_words(then: Next | None, run: Run) -> str:
    """What is done after an attempt of `run`, "" where somebody else decides."""
    match then:
        case Try(rung=rung) if rung == run.rung:
            return f"try again on rung {rung.name} after {round(then.delay_s, 1):g} s"
        case Try(rung=rung) if run.trial is not None:
            return f"go back to rung {rung.name}, which served before"
        case Try(rung=rung):
            return f"step to rung {rung.name}"
        case Fail():
            return f"give up (exit status {then.status})"
        case Anew() | Rest() | None:
            return ""
        case _ as unreachable:
            assert_never(unreachable)


def _loads(run: Run) -> int:
    """The attempts in a row for which a load was made. Of those that are remembered no more, nobody knows."""
    recent = run.ended[-run.struggle :] if run.struggle else ()
    return run.struggle - sum(ended.diagnosis is not None and ended.diagnosis.spared for ended in recent)


def _too_many(run: Run) -> Fail:
    return Fail(status=GAVE_UP, message=final_message(run, f"{_loads(run)} attempts in a row have failed or died soon"))


def _nothing_left(run: Run, failures: tuple[Failure, ...], choice: Choice) -> Fail:
    """A known cause that nothing may even be tried against is for the admin to remove. On a rung of ours his own settings had
    failed for another reason: that is giving up, not his mistake."""
    found = failures[-1].found
    first = sum(failure.found.cause == found.cause for failure in failures) == 1
    known = found.wants[-len(DEFAULT_ORDER) :] != DEFAULT_ORDER and Want.PLAIN_RETRY not in found.wants
    in_vain = found.hopeless or (first and known and not found.gpus)
    status = DO_NOT_RETRY if in_vain and run.rung == BASE else GAVE_UP
    why = "no retry can help" if in_vain else "the ladder has no rung left that could help"
    if any(out.forbidden for out in choice.outs):
        why = "what could help is not allowed" if first else "what else could help is not allowed"
    return Fail(status=status, message=final_message(run, why + _not_tried(choice)))


def _not_tried(choice: Choice) -> str:
    """What was wanted and could not be had: because it is not allowed, or because there is nothing to do it with."""
    told = [f"{out.what} ({out.why})" for out in choice.outs if not out.moot]
    return f"; not tried: {', '.join(told)}" if told else ""


def _delay_s(failures: int, run: Run, policy: Policy) -> float:
    return delay_s(
        failures,
        first_s=policy.backoff_s,
        ceiling_s=policy.backoff_ceiling_s,
        jitter=policy.backoff_jitter,
        seed=f"{policy.seed}/{run.attempt}",
    )
