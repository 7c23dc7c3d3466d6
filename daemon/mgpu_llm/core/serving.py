"""The state in which an engine serves: any exit is a failure, and so is a health probe that fails too often."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import Final

from mgpu_llm.core import diagnosis, engine_log, gpu_faults, kernel, progress
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.effects import Announce, Level, ProbeCompletion, ProbeHealth
from mgpu_llm.core.engine_log import Line, parse
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineExited,
    Event,
    GpusSampled,
    GpusUnobserved,
    GpuUnfit,
    HealthProbed,
    KernelSaid,
    LineRead,
    ProcessesSampled,
    Ticked,
)
from mgpu_llm.core.starting import Outcome
from mgpu_llm.core.states import Policy, Ready

#: An engine that dies needs up to about 15 s from its first error to its end (vLLM 0.32.0).
LAST_WORDS_S: Final = 30.0
#: A traceback over several processes fits in.
MOST_ERRORS: Final = 300


def take(state: Ready, event: Event, policy: Policy) -> Outcome:
    """Take one event into account: the next state with its effects, or why the engine counts as dead."""
    match event:
        case EngineExited():
            # vLLM exits with code 0 when its engine core dies while serving, so the code proves nothing.
            how = f"the engine ended while serving with {diagnosis.describe_status(event.status)}"
            return diagnosis.of_death(how, _last_words(state, event.at))
        case HealthProbed():
            return _after_probe(state, event, policy)
        case Ticked() if not state.probing and event.at >= state.probe_at:
            return replace(state, probing=True), (ProbeHealth(attempt=state.run.attempt),)
        case LineRead():
            return _after_line(state, event), ()
        case KernelSaid() | GpuUnfit():
            return _after_fault(state, event)
        case CompletionProbed() if state.progress.doubted is not None:
            return _after_proof(state, state.progress.doubted, event)
        case ProcessesSampled():
            return replace(state, progress=progress.after_processes(state.progress, event)), ()
        case GpusSampled():
            return replace(state, progress=progress.after_gpus(state.progress, event)), ()
        case GpusUnobserved():
            return replace(state, progress=progress.after_gpus_unobserved(state.progress, event)), ()
        case _:
            return state, ()


def _after_fault(state: Ready, event: KernelSaid | GpuUnfit) -> Outcome:
    told = gpu_faults.take(state.progress, event, served=True)
    if isinstance(told, Diagnosis):
        return told
    heart, effects = told
    if isinstance(event, GpuUnfit) or not kernel.explains(event, state.pid, heart):
        return replace(state, progress=heart), effects
    heart = progress.after_kernel(heart, event)
    if heart.doubted is None and gpu_faults.raises_doubt(event):
        heart = replace(heart, doubted=event)
        effects += (ProbeCompletion(attempt=state.run.attempt),)
    return replace(state, progress=heart), effects


def _after_proof(state: Ready, doubted: KernelSaid, event: CompletionProbed) -> Outcome:
    told = gpu_faults.after_proof(doubted, event)
    if isinstance(told, Diagnosis):
        return told
    return replace(state, progress=replace(state.progress, doubted=None)), (told,)


def _after_line(state: Ready, event: LineRead) -> Ready:
    line = parse(event.text)
    if not engine_log.is_error(line):
        return state
    return replace(state, errors=(*state.errors, (event.at, line))[-MOST_ERRORS:])


def _last_words(state: Ready, at: float) -> Clue:
    """What the engine's errors of the last seconds gave away, and what the kernel said then. A request that failed weeks ago
    explains no death."""
    said: list[tuple[float, KernelSaid | Line]] = [(event.at, event) for event in state.progress.kernel]
    said += state.errors
    clue = Clue()
    for said_at, words in sorted(said, key=itemgetter(0)):
        if at - said_at > LAST_WORDS_S:
            continue
        if isinstance(words, KernelSaid):
            clue = diagnosis.look_at_kernel(clue, words.text, words.gpus)
        else:
            clue = diagnosis.look(clue, words)
    return clue


def _after_probe(state: Ready, event: HealthProbed, policy: Policy) -> Outcome:
    after = replace(state, probing=False, probe_at=event.at + policy.probe_interval_s)
    if event.healthy:
        return replace(after, failed_probes=0), ()
    failed = state.failed_probes + 1
    if failed >= policy.failed_probes:
        what = f"{failed} health probes in a row failed, the last with: {event.detail}"
        return diagnosis.of_death(what, _last_words(state, event.at))
    facts = {"failed": failed, "of": policy.failed_probes, "detail": event.detail}
    return replace(after, failed_probes=failed), (Announce(name="engine.unhealthy", level=Level.WARNING, facts=facts),)
