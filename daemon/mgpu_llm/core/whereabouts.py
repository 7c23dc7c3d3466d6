"""Which attempt the daemon is at, on which rung and in which phase: what belongs to every line that is said meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from mgpu_llm.core.states import Checking, Ready, Starting, State


def of(state: State) -> Mapping[str, object]:
    """attempt, rung and phase, as facts. Of an engine that ends, and between attempts, the phase is the last that it had come to;
    before the first attempt there is nothing."""
    run = state.run
    if run.attempt == 0:
        return {}
    facts: dict[str, object] = {"attempt": run.attempt, "rung": run.rung.name}
    match state:
        case Checking():
            return {**facts, "phase": "preflight"}
        case Starting():
            return {**facts, "phase": state.progress.phase.label}
        case Ready():
            return {**facts, "phase": "serving"}
        case _ if run.ended and run.ended[-1].number == run.attempt:
            return {**facts, "phase": run.ended[-1].phase}
        case _:
            return facts
