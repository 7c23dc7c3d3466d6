"""Judge a recorded start exactly as the daemon would have: the same events through the same supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from mgpu_llm.core import decision as decisions
from mgpu_llm.core import ending, progress, recorded_policy, recording, supervisor
from mgpu_llm.core.diagnosis import Diagnosis, of_exit
from mgpu_llm.core.effects import Announce
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.recording import Recording, Row
from mgpu_llm.core.states import Killing, Policy, Starting, State

#: How a diagnosis's outcome is told of a recording: what was refused ended by itself as well.
_OUTCOMES: Final = {"stalled": "stalled", "crashed": "crashed", "refused": "crashed", "averted": "averted"}


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """One phase that was reached. Seconds; `began_s` since the spawn."""

    name: str
    began_s: float
    took_s: float
    longest_quiet_s: float
    patience_s: float


@dataclass(frozen=True, kw_only=True)
class Suspected:
    """Once nothing moved for longer than the patience: since `at_s`, and what cleared it ("" where nothing did)."""

    at_s: float
    phase: str
    cleared_s: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the daemon would have made of it. `outcome`: healthy, stalled, crashed, or running where the recording ends before
    there is anything to tell. Times are seconds since the spawn."""

    outcome: str
    verdict_at: float | None
    last_progress_at: float
    phase: str
    cause: str | None
    decision: str | None
    summary: str
    advice: str
    ended_at: float
    phases: tuple[PhaseReport, ...]
    suspicions: tuple[Suspected, ...] = ()
    evidence: tuple[str, ...] = field(default_factory=tuple)


def judge(recorded: Recording, policy: Policy | None = None) -> Report:
    """Raises RecordingError where a row's fields are not of their type. Without `policy` the recording says how it was judged,
    in its header and where that changed, and the defaults hold for what it does not say."""
    given, policy = policy, policy or recorded_policy.policy_of(recorded)
    run = recorded_policy.run_of(recorded, policy)

    def reloaded(row: Row) -> None:
        nonlocal policy
        policy = given or recorded_policy.policy_from(recorded, row)

    checked = any(row["kind"] == "preflight" for row in recorded.rows)
    last = Starting(run=run, since=0.0, progress=progress.begin(0.0, policy.weights_bytes), checking=checked)
    state: State = last
    at, told = 0.0, list[tuple[float, Announce]]()
    for event in recording.events(recorded, attempt=run.attempt, reloaded=reloaded):
        at = max(at, event.at)
        state, effects = supervisor.step(state, replace(event, at=at), policy)
        told += [(at, effect) for effect in effects if isinstance(effect, Announce)]
        if not isinstance(state, Starting):
            break
        last = state
    return _report(recorded, policy, last, state, at, told)


def to_json(report: Report) -> dict[str, Any]:
    """The report as one JSON document, times rounded to milliseconds."""
    return {key: _rounded(value) for key, value in asdict(report).items()}


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, tuple | list) else value


def _report(
    recorded: Recording, policy: Policy, last: Starting, state: State, at: float, told: list[tuple[float, Announce]]
) -> Report:
    heart = last.progress
    ended = state.run.ended[-1] if isinstance(state, Killing) and state.run.ended else None
    found = ended.diagnosis if ended else None
    outcome, verdict_at = _outcome(recorded, found, at)
    then = state.then if isinstance(state, Killing) else None
    if outcome == "running" and last.clue.cause:
        # The engine has said why it fails; the recording only ends before its process does.
        found = of_exit(1, heart.phase, last.clue, retries=policy.crashes_per_rung - 1)
        run = last.run.closed(ending.ended(last.run, last.since, heart.phase.label, at, found))
        outcome, then = _OUTCOMES[found.outcome], decisions.after_failed_load(run, policy)
    return Report(
        outcome=outcome,
        verdict_at=verdict_at,
        last_progress_at=heart.last_moved_at,
        phase=_phase(heart.phase, outcome),
        cause=found.cause if found else None,
        decision=decisions.in_words(then, last.run) or None,
        summary=found.summary if found else "",
        advice=found.advice if found else "",
        ended_at=ended.ended_at if ended is not None else max(at, recorded.ended_at),
        phases=_phases(last, policy, max(at, recorded.ended_at) if ended is None else at),
        suspicions=_suspicions(told),
        evidence=found.evidence if found else (),
    )


def _outcome(recorded: Recording, found: Diagnosis | None, at: float) -> tuple[str, float | None]:
    if found is not None:
        return _OUTCOMES[found.outcome], at
    return ("healthy" if recorded.ended_by == "healthy" else "running"), None


def _phase(phase: Phase, outcome: str) -> str:
    return "serving" if outcome == "healthy" else phase.label


def _phases(last: Starting, policy: Policy, until: float) -> tuple[PhaseReport, ...]:
    return tuple(
        PhaseReport(
            name=phase.label,
            began_s=since,
            took_s=end - since,
            longest_quiet_s=last.progress.longest_quiet.get(phase, 0.0),
            patience_s=policy.allowed[phase],
        )
        for phase, since, end in last.progress.spans(until)
    )


def _suspicions(told: list[tuple[float, Announce]]) -> tuple[Suspected, ...]:
    found = list[Suspected]()
    for at, announced in told:
        if announced.name == "engine.suspected":
            found.append(Suspected(at_s=at, phase=str(announced.facts["phase"]), cleared_s=None, why=""))
        if announced.name == "engine.cleared" and found:
            found[-1] = replace(found[-1], cleared_s=at, why=str(announced.facts["why"]))
    return tuple(found)
