"""The supervisor's judgement: one state and one event in, the next state and the effects out. Pure and without a clock.

Invariant: an engine is spawned only from states in which none exists (Stopped, Checking, Backoff, and Killing once EngineGone
has come), so that there never are two. What outlives SIGKILL is no engine any more, and its GPUs are used by none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from mgpu_llm.core import decision, ending, preflighting, serving, starting
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Announce, EndPreflight, Exit, Level, NotifyStopping, RememberRung
from mgpu_llm.core.events import (
    EngineEvent,
    Event,
    ForgetRequested,
    LinesDropped,
    Preflighted,
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
    Failed,
    Killing,
    Policy,
    Ready,
    Rest,
    Starting,
    State,
    Stopped,
    Terminating,
    Try,
)


def step(state: State, event: Event, policy: Policy) -> Step:
    """Take one event into account. Events of a dead attempt change nothing."""
    if isinstance(event, EngineEvent) and event.attempt != state.run.attempt:
        return state, ()
    if isinstance(event, ForgetRequested):
        return _forget(state, event)
    if isinstance(event, LinesDropped):
        return _dropped(state, event)
    match state:
        case Stopped():
            return _stopped(state, event, policy)
        case Checking():
            return _checking(state, event, policy)
        case Starting():
            return _starting(state, event, policy)
        case Ready():
            return _ready(state, event, policy)
        case Terminating():
            return ending.terminating(state, event, policy)
        case Killing():
            return ending.killing(state, event, policy)
        case Backoff():
            return _backoff(state, event, policy)
        case Failed():
            return state, ()
        case _ as unreachable:
            assert_never(unreachable)


def _forget(state: State, event: ForgetRequested) -> Step:
    known = state.run.known
    if known is None:
        return state, ()
    forgotten = Announce(name="rung.forgotten", facts={"rung": known.rung, "why": f"asked by {event.by}"})
    return replace(state, run=replace(state.run, known=None, forgotten=True)), (forgotten, RememberRung(known=None))


def _dropped(state: State, event: LinesDropped) -> Step:
    """Every line counts. It is told once a second at first, then whenever they are twice as many: a flood may last for hours."""
    before, now = state.run.lines_dropped, state.run.lines_dropped + event.count
    facts = {"attempt": event.attempt, "count": now, "why": "the engine prints faster than its lines can be judged"}
    told = Announce(name="engine.lines-dropped", level=Level.WARNING, facts=facts)
    doubled = now.bit_length() > before.bit_length()
    return replace(state, run=replace(state.run, lines_dropped=now)), (told,) if doubled else ()


def _stopped(state: Stopped, event: Event, policy: Policy) -> Step:
    match event:
        case StartRequested() | RestartRequested():
            return starting.begin_anew(state.run, event.at, policy)
        case StopRequested(final=True):
            return state, (NotifyStopping(), Exit(status=0))
        case _:
            return state, ()


def _checking(state: Checking, event: Event, policy: Policy) -> Step:
    end = EndPreflight(attempt=state.run.attempt)
    match event:
        case Preflighted():
            announced, found = preflighting.take(state.run, event.checked, policy)
            if found is not None:
                return ending.averted(state, event.at, found, announced, policy)
            loading, effects = starting.load(state.run, event.at, policy)
            return replace(loading, checked=event.checked), (announced, *effects)
        case StopRequested() | RestartRequested():
            run = state.run.closed(ending.ended(state.run, state.since, "preflight", event.at, None)).asked_anew()
            if isinstance(event, RestartRequested):
                again, effects = starting.begin_anew(run, event.at, policy)
                return again, (end, *effects)
            last = (NotifyStopping(), Exit(status=0)) if event.final else (Announce(name="engine.stopped"),)
            return Stopped(run=run), (end, *last)
        case _:
            return state, ()


def _starting(state: Starting, event: Event, policy: Policy) -> Step:
    match event:
        case StopRequested():
            return ending.kill_load(state, event.at, Rest(final=event.final), f"stopped by {event.by}")
        case RestartRequested():
            return ending.kill_load(state, event.at, Anew(), f"restarted by {event.by}")
        case _:
            outcome = starting.take(state, event, policy)
            if isinstance(outcome, Diagnosis):
                return _failed_load(state, event.at, outcome, policy)
            return outcome


def _failed_load(state: Starting, at: float, found: Diagnosis, policy: Policy) -> Step:
    run = state.run.closed(ending.ended(state.run, state.since, state.progress.phase.label, at, found))
    return ending.after_verdict(run, at, found, decision.after_failed_load(run, policy), policy)


def _ready(state: Ready, event: Event, policy: Policy) -> Step:
    match event:
        case StopRequested():
            return ending.terminate(state, event.at, Rest(final=event.final), f"stopped by {event.by}", policy)
        case RestartRequested():
            return ending.terminate(state, event.at, Anew(), f"restarted by {event.by}", policy)
        case _:
            outcome = serving.take(state, event, policy)
            if isinstance(outcome, Diagnosis):
                return _died(state, event.at, outcome, policy)
            return outcome


def _died(state: Ready, at: float, found: Diagnosis, policy: Policy) -> Step:
    run = state.run.closed(ending.ended(state.run, state.spawned_at, "serving", at, found))
    lasted = at - state.since >= policy.deaths_window_s
    run = replace(run, deaths=1 if lasted else run.deaths + 1, struggle=0 if lasted else run.struggle)
    then = decision.after_death(run, policy)
    if isinstance(then, Try) and then.rung != run.rung:
        run = replace(run, deaths=decision.deaths_carried_over(policy))
    return ending.after_verdict(run, at, found, then, policy)


def _backoff(state: Backoff, event: Event, policy: Policy) -> Step:
    match event:
        case Ticked() if event.at >= state.until:
            return starting.begin(state.run, state.rung, event.at, policy)
        case StartRequested():
            return starting.begin(state.run.asked_anew(), state.rung, event.at, policy)
        case RestartRequested():
            return starting.begin_anew(state.run, event.at, policy)
        case StopRequested():
            last = (NotifyStopping(), Exit(status=0)) if event.final else (Announce(name="engine.stopped"),)
            return Stopped(run=state.run), last
        case _:
            return state, ()
