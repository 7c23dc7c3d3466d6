"""The state in which an engine serves: any exit is a failure, and so is a health probe that fails too often."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import Final

from mgpu_llm.core import diagnosis, engine_log, kernel, progress
from mgpu_llm.core.diagnosis import Clue
from mgpu_llm.core.effects import Announce, Level, ProbeHealth
from mgpu_llm.core.engine_log import Line, parse
from mgpu_llm.core.events import (
    EngineExited,
    Event,
    GpusSampled,
    GpusUnobserved,
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
        case KernelSaid() if kernel.explains(event, state.pid, state.progress):
            return replace(state, progress=progress.after_kernel(state.progress, event)), ()
        case ProcessesSampled():
            return replace(state, progress=progress.after_processes(state.progress, event)), ()
        case GpusSampled():
            return replace(state, progress=progress.after_gpus(state.progress, event)), ()
        case GpusUnobserved():
            return replace(state, progress=progress.after_gpus_unobserved(state.progress, event)), ()
        case _:
            return state, ()


def _after_line(state: Ready, event: LineRead) -> Ready:
    line = parse(event.text)
    if not engine_log.is_error(line):
        return state
    return replace(state, errors=(*state.errors, (event.at, line))[-MOST_ERRORS:])


def _last_words(state: Ready, at: float) -> Clue:
    """What the engine's errors of the last seconds gave away, and what the kernel said then. A request that failed weeks ago
    explains no death."""
    said: list[tuple[float, str | Line]] = [(event.at, event.text) for event in state.progress.kernel]
    said += state.errors
    clue = Clue()
    for said_at, words in sorted(said, key=itemgetter(0)):
        if at - said_at > LAST_WORDS_S:
            continue
        clue = diagnosis.look_at_kernel(clue, words) if isinstance(words, str) else diagnosis.look(clue, words)
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
