"""The state in which an engine loads: feed the heartbeat, judge it, and ask for proof of service."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, assert_never

from mgpu_llm.core import (
    decision,
    diagnosis,
    gpu_faults,
    judging,
    kernel,
    known_good,
    preflighting,
    progress,
    readiness,
    room,
    stall,
    unusable,
)
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import (
    Announce,
    Effect,
    EndPreflight,
    Exit,
    ExtendTimeout,
    Level,
    ProbeCompletion,
    ProbeHealth,
    RememberRung,
    SpawnEngine,
)
from mgpu_llm.core.engine_log import Phase, parse
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineExited,
    EngineSpawned,
    EngineSpawnFailed,
    Event,
    GpusSampled,
    GpusUnobserved,
    GpuUnfit,
    HealthProbed,
    HostSampled,
    KernelSaid,
    LineRead,
    Preflighted,
    ProcessesSampled,
    StacksTaken,
    Ticked,
)
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.launch import differences
from mgpu_llm.core.preflight import When
from mgpu_llm.core.states import Checking, Fail, Failed, Policy, Run, Starting, State

#: Seconds between health probes while loading: a refused connection costs nothing.
PROBE_EVERY_S: Final = 0.5
#: While progress is real, systemd is asked for more time at most this often.
EXTEND_EVERY_S: Final = 5.0
#: What is asked for beyond the phase's patience, so that a verdict, its evidence, the kill and the next spawn fit in.
EXTEND_SLACK_S: Final = 85.0

Step = tuple[State, tuple[Effect, ...]]
Outcome = Step | Diagnosis


def begin_anew(run: Run, at: float, policy: Policy) -> Step:
    """Begin because somebody wants it: where the last start served, or one rung above that to see whether it can be had again."""
    beginning = known_good.begin(run.known, policy.ladder, boot=policy.boot, up_after=policy.up_after)
    run = replace(run.asked_anew(), known=beginning.known, forgotten=False)
    if beginning.known is None:
        return begin(run, beginning.rung, at, policy)
    facts: dict[str, object] = {
        "rung": beginning.known.rung,
        "since": beginning.known.since,
        "cause": beginning.known.cause,
    }
    if beginning.trial:
        run = replace(run, trial=policy.ladder.rung(beginning.known.rung))
        facts["trying"] = f"rung {beginning.rung.name} once, to see whether it serves again: {beginning.why}"
    else:
        facts["forget"] = "mgpuctl forget"
    state, effects = begin(run, beginning.rung, at, policy)
    remembered = Announce(name="rung.remembered", facts=facts)
    return state, (remembered, RememberRung(known=beginning.known), *effects)


def begin(run: Run, rung: Rung, at: float, policy: Policy) -> Step:
    """Begin one more attempt, on `rung`. A new attempt is progress: the last one has been judged and cleared away. Without
    GPUs that suffice it is over."""
    sound = unusable.around(run, rung, policy)
    if isinstance(sound, Fail):
        failed = Failed(run=run, status=sound.status, message=sound.message)
        return failed, (Exit(status=sound.status, message=sound.message),)
    rung = sound
    run = decision.begun(run, rung)
    facts: dict[str, object] = {"attempt": run.attempt, "rung": rung.name}
    if changes := differences(policy.ladder.base, policy.launch(rung)):
        facts["changes"] = "; ".join(changes)
    announced = Announce(name="engine.starting", level=Level.INFO if rung == BASE else Level.WARNING, facts=facts)
    check = preflighting.begin(run, policy)
    if check and policy.preflight is When.BEFORE:
        # All at once: nothing of it is seen from here before it is done.
        more_time = ExtendTimeout(seconds=policy.preflight_s + EXTEND_SLACK_S)
        return Checking(run=run, since=at), (announced, more_time, *check)
    starting, effects = load(run, at, policy)
    return replace(starting, checking=bool(check)), (announced, *effects, *check)


def load(run: Run, at: float, policy: Policy) -> tuple[Starting, tuple[Effect, ...]]:
    """Spawn the engine of an attempt that has begun."""
    heart = progress.begin(at, policy.weights_bytes)
    return Starting(run=run, since=at, progress=heart, extended_at=at), (
        ExtendTimeout(seconds=EXTEND_SLACK_S),
        SpawnEngine(attempt=run.attempt, launch=policy.launch(run.rung), needs_free=room.needed(policy, run.rung)),
    )


def take(state: Starting, event: Event, policy: Policy) -> Outcome:
    """Take one event into account: the next state with its effects, or why the load has failed."""
    match event:
        case LineRead():
            return _after_line(state, event)
        case ProcessesSampled() | StacksTaken() | GpusSampled() | GpusUnobserved() | HostSampled():
            return _after_look(state, event, policy)
        case KernelSaid() | GpuUnfit():
            return _after_fault(state, event)
        case Preflighted() if state.checking:
            return _after_preflight(state, event, policy)
        case Ticked():
            return _after_tick(state, event, policy)
        case EngineSpawned():
            hints = (*event.taken, *state.clue.hints)[: diagnosis.MOST_HINTS]
            return replace(state, pid=event.pid, clue=replace(state.clue, hints=hints)), ()
        case EngineSpawnFailed():
            return diagnosis.of_spawn(event.reason, hopeless=event.hopeless, rank=event.rank)
        case EngineExited():
            retries = policy.crashes_per_rung - 1
            return diagnosis.of_exit(event.status, state.progress.phase, state.clue, retries=retries)
        case HealthProbed(healthy=True) if _may_serve(state):
            return replace(state, probing=True), (ProbeCompletion(attempt=state.run.attempt),)
        case HealthProbed():
            return replace(state, probing=False, probe_at=event.at + PROBE_EVERY_S), ()
        case CompletionProbed():
            return _after_completion(state, event, policy)
        case _:
            return state, ()


def _after_line(state: Starting, event: LineRead) -> Outcome:
    before = state.progress
    now = progress.after_line(before, event)
    changed = replace(state, progress=now, clue=diagnosis.look(state.clue, parse(event.text)))
    effects = list[Effect]()
    if now.phase > before.phase:
        facts = {"phase": now.phase.label, "attempt": state.run.attempt, "after_s": round(event.at - state.since, 1)}
        effects.append(Announce(name="engine.phase", facts=facts))
    if state.checking and now.phase >= Phase.DISTRIBUTED_INIT:
        # The engine measures what is free on its GPUs, and must find them as they will be.
        changed = replace(changed, checking=False)
        effects += (preflighting.UNFINISHED, EndPreflight(attempt=state.run.attempt))
    if now.serving and not before.serving and not state.probing:
        changed = replace(changed, probing=True)
        effects.append(ProbeHealth(attempt=state.run.attempt))
    return changed, tuple(effects)


def _after_fault(state: Starting, event: KernelSaid | GpuUnfit) -> Outcome:
    told = gpu_faults.take(state.progress, event, served=False)
    if isinstance(told, Diagnosis):
        return told
    heart, effects = told
    if isinstance(event, GpuUnfit) or not kernel.explains(event, state.pid, heart):
        return replace(state, progress=heart), effects
    clue = diagnosis.look_at_kernel(state.clue, event.text, event.gpus)
    return replace(state, clue=clue, progress=progress.after_kernel(heart, event)), effects


def _after_look(
    state: Starting, event: ProcessesSampled | StacksTaken | GpusSampled | GpusUnobserved | HostSampled, policy: Policy
) -> Outcome:
    match event:
        case ProcessesSampled():
            seen = replace(state, progress=progress.after_processes(state.progress, event))
            return judging.after_sample(seen, event.at, policy)
        case StacksTaken():
            return judging.after_stacks(state, event, policy)
        case GpusSampled():
            return replace(state, progress=progress.after_gpus(state.progress, event)), ()
        case GpusUnobserved():
            return _after_gpus_unobserved(state, event)
        case HostSampled():
            return replace(state, progress=progress.after_host(state.progress, event)), ()
        case _ as unreachable:
            assert_never(unreachable)


def _after_gpus_unobserved(state: Starting, event: GpusUnobserved) -> Step:
    changed = replace(state, progress=progress.after_gpus_unobserved(state.progress, event))
    if state.warned_unobserved:
        return changed, ()
    changed = replace(changed, warned_unobserved=True)
    facts = {
        "why": event.reason,
        "consequence": "GPU memory does not count as progress, patience is three times as long",
    }
    return changed, (Announce(name="gpus.unobserved", level=Level.WARNING, facts=facts),)


def _after_tick(state: Starting, event: Ticked, policy: Policy) -> Step:
    effects = list[Effect]()
    changed = state
    if state.progress.last_moved_at > state.extended_at and event.at - state.extended_at >= EXTEND_EVERY_S:
        patience_s = stall.patience_now(state.progress, policy.allowed, judging.circumstances(state, policy))
        effects.append(ExtendTimeout(seconds=patience_s * stall.UNCONFIRMED_FACTOR + EXTEND_SLACK_S))
        changed = replace(changed, extended_at=event.at)
    if not state.probing and event.at >= state.probe_at and _may_serve(state):
        effects.append(ProbeHealth(attempt=state.run.attempt))
        changed = replace(changed, probing=True)
    return changed, tuple(effects)


def _may_serve(state: Starting) -> bool:
    """Whether to ask for service now. Whatever answers before the engine can is not the engine. One whose log says
    nothing known is asked all along, as nothing else tells when it serves."""
    heart = state.progress
    return state.pid is not None and (heart.phase is Phase.API or not heart.spoke_known_words)


def _after_preflight(state: Starting, event: Preflighted, policy: Policy) -> Outcome:
    announced, found = preflighting.take(state.run, event.checked, policy)
    return found or (replace(state, checking=False, checked=event.checked), (announced,))


def _after_completion(state: Starting, event: CompletionProbed, policy: Policy) -> Outcome:
    if event.served and _may_serve(state):
        return readiness.served(state, event.at, policy)
    if event.hopeless and _may_serve(state):
        return diagnosis.of_refused_completion(event.detail)
    return replace(state, probing=False, probe_at=event.at + PROBE_EVERY_S), ()
