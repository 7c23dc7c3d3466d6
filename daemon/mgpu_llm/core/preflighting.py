"""The check of the GPUs in the course of an attempt: when there is one, and what follows from what it has found.

It may end a load only where something is known that helps: an engine that would hang all the same is left to show its own cause.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mgpu_llm.core import cures, decision, remedies, transports
from mgpu_llm.core.case import Failure
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Announce, BeginPreflight, Effect, Level
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.preflight import Checked, When
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.states import Policy, Run

#: The engine has come to its GPUs before the check had its answer.
UNFINISHED: Final = Announce(
    name="preflight.unfinished",
    facts={"why": 'the engine came to its GPUs first; preflight.mode = "before" waits for the answer'},
)


def begin(run: Run, policy: Policy) -> tuple[Effect, ...]:
    """Begin the check of an attempt that has begun, if there is to be one."""
    gpus = transports.ranks(policy.ladder, run.rung)
    if policy.preflight is When.OFF or not gpus:
        return ()
    return (
        BeginPreflight(
            attempt=run.attempt,
            gpus=gpus,
            launch=policy.launch(run.rung),
            transports=transports.asked(policy.ladder, run.rung),
            anew=_in_doubt(run),
        ),
    )


def take(run: Run, checked: Checked, policy: Policy) -> tuple[Announce, Diagnosis | None]:
    """What is told of the answer, and why the load must not go on, None where it may."""
    facts: dict[str, object] = {"attempt": run.attempt}
    if checked.unobserved:
        facts |= {"why": checked.unobserved, "consequence": "what is wrong with the GPUs shows in the load only"}
        return Announce(name="preflight.unobserved", facts=facts), None
    facts |= {"gpus": ",".join(transports.ranks(policy.ladder, run.rung)), "found": transports.summary(checked)}
    found = transports.judge(checked, transports.ranks(policy.ladder, run.rung))
    if found is None:
        return Announce(name="preflight.passed", facts=facts), None
    facts |= {"cause": found.cause, "summary": found.summary, "advice": found.advice}
    if _has_a_cure(run, found, policy):
        return Announce(name="preflight.failed", level=Level.WARNING, facts=facts), found
    facts["consequence"] = "nothing that may be changed is known to help, so the load goes on"
    return Announce(name="preflight.failed", level=Level.WARNING, facts=facts), None


def _has_a_cure(run: Run, found: Diagnosis, policy: Policy) -> bool:
    """Whether going on elsewhere is known to be better than to see what becomes of this load."""
    if run.trial is not None:
        return True
    failures = (*_failures_before(run), Failure(rung=run.rung, found=found))
    remedy = cures.choose(policy.ladder, failures, again=False).remedy
    if remedy is None:
        return False
    if Want.TRANSPORT in found.wants and remedy.name in transports.asked(policy.ladder, run.rung):
        return found.transports.get(remedy.name, False)  # another transport only where it was seen to work
    return _avoids(found, run.rung, run.rung.plus(remedy), policy)


def _avoids(found: Diagnosis, now: Rung, then: Rung, policy: Policy) -> bool:
    """Whether what was found does not concern a load on rung `then`. The admin's own rungs may be about anything else."""
    ranks_now, ranks_then = transports.ranks(policy.ladder, now), transports.ranks(policy.ladder, then)
    if found.gpus:
        return set(found.gpus).isdisjoint(ranks_then)
    if len(ranks_then) < len(ranks_now):
        return True
    was_on, is_on = (remedies.CUSTOM_ALL_REDUCE_OFF.over(each) != each for each in map(policy.launch, (now, then)))
    return Want.CUSTOM_ALL_REDUCE in found.wants and was_on and not is_on


def _in_doubt(run: Run) -> bool:
    """Whether a load has failed of what a check had perhaps passed."""
    return any(
        Want.TRANSPORT in failure.found.wants and failure.found.outcome != "averted"
        for failure in _failures_before(run)
    )


def _failures_before(run: Run) -> tuple[Failure, ...]:
    """Those before the attempt of `run`, which has begun."""
    return decision.failures_since_it_served(replace(run, tries=run.tries - 1)) if run.tries > 1 else ()
