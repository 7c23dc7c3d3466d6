"""Which areas of the settings are changed by what runs, is about to run, or counts for the next decision."""

from __future__ import annotations

from mgpu_llm.core import decision
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.states import Backoff, Killing, State, Terminating, Try


def areas(state: State) -> frozenset[Area]:
    """Of the rung, of the one to be tried next or to go back to, and of those that failed in a row."""
    run = state.run
    rungs = (run.rung, _next(state), run.trial, *(ended.rung for ended in decision.failed_in_a_row(run)))
    remedies = [remedy for rung in rungs if rung is not None for remedy in rung.remedies]
    return frozenset(remedy.area for remedy in remedies if remedy.area is not None)


def _next(state: State) -> Rung | None:
    match state:
        case Backoff(rung=rung) | Terminating(then=Try(rung=rung)) | Killing(then=Try(rung=rung)):
            return rung
        case _:
            return None
