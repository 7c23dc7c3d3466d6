"""The states in which an engine ends: asked to, then killed, until nothing of it is left."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, assert_never

from mgpu_llm.core import decision, incident, starting, unusable
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import (
    AbandonIncident,
    Announce,
    Effect,
    Exit,
    ExtendTimeout,
    KeepIncident,
    KillEngine,
    Level,
    NotifyStopping,
    RememberRung,
    TerminateEngine,
)
from mgpu_llm.core.events import (
    EngineExited,
    EngineGone,
    EngineStuck,
    Event,
    IncidentKept,
    RestartRequested,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.starting import Step
from mgpu_llm.core.states import (
    Anew,
    Backoff,
    Checking,
    Ended,
    Fail,
    Failed,
    Killing,
    Next,
    Policy,
    Ready,
    Rest,
    Run,
    Starting,
    Stopped,
    Terminating,
    Try,
)

EndingState = TypeVar("EndingState", Terminating, Killing)


def kill_load(state: Starting, at: float, then: Next, why: str) -> Step:
    """End a loading engine on request. It is not asked first: it would swallow SIGTERM, and has nothing to drain."""
    run = state.run.closed(ended(state.run, state.since, state.progress.phase.label, at, None)).asked_anew()
    effects = (_announced(why), *_last_word(then), KillEngine(attempt=run.attempt))
    return Killing(run=run, since=at, then=then, why=why), effects


def terminate(state: Ready, at: float, then: Next, why: str, policy: Policy) -> Step:
    """End a serving engine on request: SIGTERM, and a grace in which it may finish."""
    run = state.run.closed(ended(state.run, state.spawned_at, "serving", at, None)).asked_anew()
    more_time = ExtendTimeout(seconds=policy.stop_grace_s + policy.kill_deadline_s + starting.EXTEND_EVERY_S)
    effects = (_announced(why), *_last_word(then), more_time, TerminateEngine(attempt=run.attempt))
    return Terminating(run=run, deadline=at + policy.stop_grace_s, then=then, why=why), effects


def after_verdict(run: Run, at: float, found: Diagnosis, then: Next, policy: Policy) -> Step:
    """An attempt has failed: say why, clear it away, and go on to `then`."""
    facts: dict[str, object] = {"attempt": run.attempt, "rung": run.rung.name, "cause": found.cause}
    facts |= {"summary": found.summary, "advice": found.advice, "next": decision.in_words(then, run)}
    kept = _incident(run, at, found, then, policy)
    if kept:
        facts["incident"] = kept[0].incident
    level = Level.WARNING if found.spared else Level.ERROR
    announced = [Announce(name=f"engine.{found.outcome}", level=level, facts=facts)]
    announced += [Announce(name="engine.evidence", facts={"seen": seen}) for seen in found.evidence]
    run, out = unusable.noted(replace(run, trial=None), dict.fromkeys(found.gpus, found.summary))
    killing = Killing(run=run, since=at, then=then, why=found.summary, keeping=bool(kept))
    return killing, (*announced, *out, *kept, KillEngine(attempt=run.attempt))


def averted(state: Checking, at: float, found: Diagnosis, announced: Announce, policy: Policy) -> Step:
    """The check before the load has found what it would fail of: there is no engine to be cleared away."""
    run = state.run.closed(ended(state.run, state.since, "preflight", at, found))
    then = decision.after_failed_load(run, policy)
    told = replace(announced, facts={**announced.facts, "next": decision.in_words(then, run)})
    run, out = unusable.noted(replace(run, trial=None), dict.fromkeys(found.gpus, found.summary))
    after, effects = _proceed(run, then, at, policy)
    return after, (told, *out, *effects)


def ended(run: Run, since: float, phase: str, at: float, found: Diagnosis | None) -> Ended:
    """The record of an attempt that is over; without a diagnosis it was stopped on request."""
    return Ended(
        number=run.attempt,
        rung=run.rung,
        outcome=found.outcome if found else "stopped",
        phase=phase,
        ended_at=at,
        duration_s=at - since,
        diagnosis=found,
    )


def terminating(state: Terminating, event: Event, policy: Policy) -> Step:
    """Wait for the engine to end by itself, up to the deadline."""
    killing = Killing(run=state.run, since=event.at, then=state.then, why=state.why)
    kill = KillEngine(attempt=state.run.attempt)
    match event:
        case EngineExited():
            return killing, (kill,)
        case Ticked() if event.at >= state.deadline:
            why = f"still there {policy.stop_grace_s:g} s after SIGTERM"
            return killing, (Announce(name="engine.killing", level=Level.WARNING, facts={"why": why}), kill)
        case StopRequested():
            # Asked twice: whoever asks does not want to wait for the grace to pass.
            return replace(killing, then=_rest(state.then, event)), (*_stopping(event), kill)
        case RestartRequested() | StartRequested():
            return _asked_back(state, event), ()
        case _:
            return state, ()


def killing(state: Killing, event: Event, policy: Policy) -> Step:
    """Wait until nothing of the engine is left, then go on."""
    match event:
        case EngineGone():
            remarks = tuple(
                Announce(name="engine.left", level=Level.WARNING, facts={"what": what}) for what in event.remarks
            )
            run, out = unusable.noted(state.run, dict(event.dirty))
            after, effects = _proceed(run, state.then, event.at, policy)
            return after, (*remarks, *out, *effects)
        case EngineStuck():
            return _stuck(state, event, policy)
        case IncidentKept() if state.keeping:
            return replace(state, run=state.run.with_incident(event.incident), keeping=False), ()
        case StopRequested():
            # Whoever asks for a stop does not want to wait for evidence.
            abandoned = (AbandonIncident(attempt=state.run.attempt),) if state.keeping else ()
            return replace(state, then=_rest(state.then, event), keeping=False), (*_stopping(event), *abandoned)
        case RestartRequested() | StartRequested():
            return _asked_back(state, event), ()
        case _:
            return state, ()


def _asked_back(state: EndingState, event: RestartRequested | StartRequested) -> EndingState:
    """Somebody wants it to run again before it has ended; that a daemon's own end is under way weighs more. A restart is a
    planned start also where another attempt would follow by itself."""
    if isinstance(state.then, Try) and isinstance(event, RestartRequested):
        return replace(state, then=Anew())
    if not isinstance(state.then, Rest) or state.then.final:
        return state
    return replace(state, then=Anew())


def _stuck(state: Killing, event: EngineStuck, policy: Policy) -> Step:
    """What cannot be ended keeps its GPUs; with others that suffice it goes on, and leaves it behind."""
    held = ", ".join(event.holders)
    run, out = unusable.noted(state.run, dict(event.dirty))
    if event.dirty and not isinstance(state.then, Fail) and not (isinstance(state.then, Rest) and state.then.final):
        after, effects = _proceed(run, state.then, event.at, policy)
        return after, (*out, *effects)
    message = f"cannot end {held}: the kernel does not let them go; reset the GPUs or reboot the host"
    status = 0 if isinstance(state.then, Rest) and state.then.final else decision.GAVE_UP
    announced = Announce(
        name="engine.unkillable", level=Level.ERROR, facts={"holders": held, "advice": "reset or reboot"}
    )
    return Failed(run=run, status=status, message=message), (announced, Exit(status=status, message=message))


def _proceed(run: Run, then: Next, at: float, policy: Policy) -> Step:
    match then:
        case Try(delay_s=delay) if delay > 0:
            waiting = Announce(name="engine.waiting", facts={"retry_in_s": round(delay, 1)})
            more_time = ExtendTimeout(seconds=delay + starting.EXTEND_SLACK_S)
            return Backoff(run=run, rung=then.rung, until=at + delay), (waiting, more_time)
        case Try():
            return starting.begin(run, then.rung, at, policy)
        case Anew():
            return starting.begin_anew(run, at, policy)
        case Rest():
            exits = (Exit(status=0),) if then.final else ()
            return Stopped(run=run), (Announce(name="engine.stopped"), *exits)
        case Fail():
            message = then.message + _where_the_evidence_lies(run, policy)
            # What served before does so no longer: the next start begins with the admin's own settings.
            forgotten = (RememberRung(known=None),) if run.known is not None else ()
            failed = Failed(run=replace(run, known=None), status=then.status, message=message)
            return failed, (*forgotten, Exit(status=then.status, message=message))
        case _ as unreachable:
            assert_never(unreachable)


def _incident(run: Run, at: float, found: Diagnosis, then: Next, policy: Policy) -> tuple[KeepIncident, ...]:
    if not policy.incidents or found.spared:
        return ()
    ended, rung = run.ended[-1], run.rung
    kept = KeepIncident(
        attempt=run.attempt,
        incident=incident.name(policy.utc_s + at, run.attempt, found.cause),
        rung=rung.name,
        phase=ended.phase,
        outcome=found.outcome,
        cause=found.cause,
        summary=found.summary,
        advice=found.advice,
        evidence=found.evidence,
        duration_s=ended.duration_s,
        decision=decision.in_words(then, run),
        launch=policy.launch(rung),
    )
    return (kept,)


def _where_the_evidence_lies(run: Run, policy: Policy) -> str:
    ids = [ended.incident for ended in decision.failed_in_a_row(run) if ended.incident]
    return f". Evidence in {policy.incidents}: {', '.join(ids)}" if ids else ""


def _announced(why: str) -> Announce:
    return Announce(name="engine.stopping", facts={"why": why})


def _last_word(then: Next) -> tuple[Effect, ...]:
    return (NotifyStopping(),) if isinstance(then, Rest) and then.final else ()


def _rest(then: Next, event: StopRequested) -> Next:
    return Rest(final=event.final or (isinstance(then, Rest) and then.final))


def _stopping(event: StopRequested) -> tuple[Effect, ...]:
    return (NotifyStopping(),) if event.final else ()
