"""Judge a load after each look at it: let it go on, suspect it and look closer, or call it stalled."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from mgpu_llm.core import diagnosis, progress, stall
from mgpu_llm.core import suspicion as suspicions
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Announce, Effect, Level, TakeStacks
from mgpu_llm.core.events import StacksTaken
from mgpu_llm.core.stall import Circumstances, Moving, Stalled, Suspect
from mgpu_llm.core.states import Policy, Starting
from mgpu_llm.core.suspicion import Finding, Suspicion

Judged = tuple[Starting, tuple[Effect, ...]] | Diagnosis


def circumstances(state: Starting, policy: Policy) -> Circumstances:
    """What the patience depends on beside the phase."""
    has_gpus = policy.ladder.base.gpus is not None
    return Circumstances(has_gpus=has_gpus, failed=bool(state.clue.cause))


def after_sample(state: Starting, at: float, policy: Policy) -> Judged:
    """Judge after a sample of the processes: only these make quiet grow."""
    waited = None
    if state.suspicion is not None:
        waited = suspicions.after_waiting(state.suspicion, state.progress.observed_s, at)
    return _judged(state, waited, at, policy)


def after_stacks(state: Starting, event: StacksTaken, policy: Policy) -> Judged:
    """Judge after a look at the stacks, which counts only where somebody is suspected."""
    if state.suspicion is None:
        return state, ()
    looked = suspicions.after_look(state.suspicion, event, gpus_spin=stall.gpus_spin(state.progress))
    return _judged(state, looked, event.at, policy)


def _judged(state: Starting, suspicion: Suspicion | None, at: float, policy: Policy) -> Judged:
    verdict = stall.judge(state.progress, policy.allowed, circumstances(state, policy), suspicion)
    match verdict:
        case Stalled():
            return diagnosis.of_stall(verdict, state.clue)
        case Moving() if suspicion is None:
            return state, ()
        case Moving():
            return _cleared(state, at, "it moves again")
        case Suspect() if suspicion is not None and suspicion.finding is Finding.MOVING:
            working = replace(state, progress=progress.after_work_seen(state.progress, at))
            return _cleared(working, at, "its stacks are not where they were")
        case Suspect():
            return _suspected(state, verdict, suspicion, at, policy)
        case _ as unreachable:
            assert_never(unreachable)


def _cleared(state: Starting, at: float, why: str) -> Judged:
    since = state.suspicion.since if state.suspicion is not None else at
    facts = {"attempt": state.run.attempt, "phase": state.progress.phase.label, "why": why}
    facts |= {"suspected_s": f"{at - since:.1f}"}
    return replace(state, suspicion=None), (Announce(name="engine.cleared", facts=facts),)


def _suspected(state: Starting, verdict: Suspect, suspicion: Suspicion | None, at: float, policy: Policy) -> Judged:
    effects = list[Effect]()
    if suspicion is None:
        suspicion = suspicions.raised(at, may_look=policy.look_at_stacks)
        facts: dict[str, object] = {"attempt": state.run.attempt, "phase": state.progress.phase.label}
        facts |= {"quiet_s": round(verdict.idle_s, 1), "patience_s": round(verdict.patience_s, 1)}
        facts |= {"only": "small signals move"} if verdict.feeble else {}
        facts |= {"next": "two looks where its threads stand"} if policy.look_at_stacks else {}
        effects.append(Announce(name="engine.suspected", facts=facts))
    was_blind = state.suspicion is not None and state.suspicion.finding is Finding.BLIND
    if suspicion.finding is Finding.BLIND and not was_blind:
        consequence = (
            f"quiet alone has to convince: {verdict.until_s:.0f} s of it instead of {verdict.patience_s:.0f} s"
        )
        unseen = {"why": suspicion.blind, "consequence": consequence}
        effects.append(Announce(name="stacks.inconclusive", level=Level.WARNING, facts=unseen))
    if suspicions.look_is_due(suspicion, at):
        suspicion = suspicions.asked(suspicion, state.progress.observed_s)
        effects.append(TakeStacks(attempt=state.run.attempt))
    return replace(state, suspicion=suspicion), tuple(effects)
