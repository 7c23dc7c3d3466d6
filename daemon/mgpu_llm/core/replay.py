"""Judge a recorded start exactly as the daemon would have: the same events through the same supervisor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from mgpu_llm.core import decision as decisions
from mgpu_llm.core import ladder, progress, readings, recording, supervisor
from mgpu_llm.core.diagnosis import Diagnosis, of_exit
from mgpu_llm.core.effects import Announce
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.ladder import Heads, Kind, Rung
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.recording import Recording, RecordingError, Row
from mgpu_llm.core.states import Killing, Policy, Run, Starting, State

#: How a diagnosis's outcome is told of a recording: what was refused ended by itself as well.
_OUTCOMES: Final = {"stalled": "stalled", "crashed": "crashed", "refused": "crashed"}


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
    """Raises RecordingError where a row's fields are not of their type. Without `policy` the recording's own header says how
    it was judged, and the defaults hold for what it does not say."""
    policy = policy or policy_of(recorded)
    run = _run(recorded, policy)
    last = Starting(run=run, since=0.0, progress=progress.begin(0.0, policy.weights_bytes))
    state: State = last
    at, told = 0.0, list[tuple[float, Announce]]()
    for event in recording.events(recorded, attempt=run.attempt):
        at = max(at, event.at)
        state, effects = supervisor.step(state, replace(event, at=at), policy)
        told += [(at, effect) for effect in effects if isinstance(effect, Announce)]
        if not isinstance(state, Starting):
            break
        last = state
    return _report(recorded, policy, last, state, at, told)


def recorded_header(policy: Policy, run: Run) -> Row:
    """The first row of a recording of the attempt that `run` has just begun: what its judgement depends on. The inverse of
    `policy_of`."""
    return recording.note(
        0.0,
        "attempt",
        format=recording.FORMAT,
        attempt=run.attempt,
        rung=policy.rungs[run.rung].name,
        tries=run.tries,
        tries_on_rung=run.tries_on_rung,
        rungs=[[rung.name, rung.kind.value, rung.launch.gpus is not None] for rung in policy.rungs],
        tp=policy.rungs[run.rung].launch.tensor_parallel,
        patience={phase.label: seconds for phase, seconds in policy.allowed.items()},
        stacks=policy.look_at_stacks,
        attempts=policy.attempts,
        crashes_per_rung=policy.crashes_per_rung,
        backoff=[policy.backoff_s, policy.backoff_ceiling_s],
        weights_bytes=policy.weights_bytes,
    )


def policy_of(recorded: Recording) -> Policy:
    """How the recording was judged. Raises RecordingError where its header is broken."""
    given = recorded.header
    try:
        if given.get("format", recording.FORMAT) != recording.FORMAT:
            raise ValueError(f"it has format {given.get('format')!r}, and this version knows {recording.FORMAT}")
        policy = Policy(rungs=_rungs(recorded), learn_factor=None)
        backoff_s, ceiling_s = given.get("backoff", (policy.backoff_s, policy.backoff_ceiling_s))
        patience = {phase: float(given.get("patience", {}).get(phase.label, s)) for phase, s in policy.patience.items()}
        if not all(0 < seconds < math.inf for seconds in patience.values()):
            raise ValueError("a patience is no time in seconds")
        return replace(
            policy,
            patience=patience,
            look_at_stacks=bool(given.get("stacks", True)),
            attempts=int(given.get("attempts", policy.attempts)),
            crashes_per_rung=int(given.get("crashes_per_rung", policy.crashes_per_rung)),
            backoff_s=float(backoff_s),
            backoff_ceiling_s=float(ceiling_s),
            weights_bytes=readings.count(given.get("weights_bytes")),
        )
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise RecordingError(f"its first row is broken: {error}") from error


def to_json(report: Report) -> dict[str, Any]:
    """The report as one JSON document, times rounded to milliseconds."""
    return {key: _rounded(value) for key, value in asdict(report).items()}


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, tuple | list) else value


def _run(recorded: Recording, policy: Policy) -> Run:
    """The attempt that was recorded. A policy that is not the recording's own may not know its rung: then it is the base."""
    given, names = recorded.header, [rung.name for rung in policy.rungs]
    try:
        return Run(
            attempt=int(given.get("attempt", 1)),
            rung=names.index(given["rung"]) if given.get("rung") in names else 0,
            tries=int(given.get("tries", 1)),
            tries_on_rung=int(given.get("tries_on_rung", 1)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordingError(f"its first row is broken: {error}") from error


def _rungs(recorded: Recording) -> tuple[Rung, ...]:
    """The rungs of the header; only names, kinds and whether there are GPUs count for a judgement. Without a header, the
    built-in ladder for as many GPUs as were sampled."""
    if rows := recorded.header.get("rungs"):
        size = int(recorded.header.get("tp", 1))
        on = Launch(gpus=(), tensor_parallel=size, utilisation=None)
        off = replace(on, gpus=None)
        if recorded.header.get("rung") not in [row[0] for row in rows]:
            raise ValueError("its rung is none of its rungs")
        return tuple(Rung(name=str(name), kind=Kind(kind), launch=on if gpus else off) for name, kind, gpus in rows)
    seen = max((len(row.get("gpus") or ()) for row in recorded.rows if row["kind"] == "sample"), default=0)
    gpus = tuple(str(index) for index in range(seen)) if recorded.has_gpus else None
    base = Launch(gpus=gpus, tensor_parallel=seen or 2, utilisation=0.9 if gpus else None)
    return ladder.built_in(base, Heads(), step=0.05, floor=0.7)


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
        outcome, then = _OUTCOMES[found.outcome], decisions.after_failed_load(last.run, found, policy)
    return Report(
        outcome=outcome,
        verdict_at=verdict_at,
        last_progress_at=heart.last_moved_at,
        phase=_phase(heart.phase, outcome),
        cause=found.cause if found else None,
        decision=decisions.in_words(then, last.run, policy) or None,
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
