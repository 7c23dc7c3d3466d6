"""Fill the shapes of core/status from a state: what is told is derived, never kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from mgpu_llm.core import judging, known_good, outlook, planning, readiness, stall, transports, unusable
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.launch import differences
from mgpu_llm.core.states import (
    Backoff,
    Checking,
    Ended,
    Failed,
    Killing,
    Policy,
    Ready,
    Run,
    Starting,
    State,
    Stopped,
    Terminating,
)
from mgpu_llm.core.status import AttemptStatus, Degradation, GpuStatus, RungStatus, Status


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What this daemon is: its version, the model it serves, and where."""

    version: str
    model: str
    url: str


def status(state: State, policy: Policy, at: float, identity: Identity) -> Status:
    """Everything there is to tell at `at`, seconds on the clock of the events."""
    rung = state.run.rung
    heart = state.progress if isinstance(state, Starting | Ready) else None
    patience_s, seen = None, None
    if isinstance(state, Starting):
        patience_s = stall.patience_now(state.progress, policy.allowed, judging.circumstances(state, policy))
        seen = outlook.of(state, policy, at)
    idle = isinstance(state, Stopped)
    return Status(
        state=state_name(state),
        headline=headline(state, policy, at),
        version=identity.version,
        model=identity.model,
        url=identity.url,
        pid=state.pid if isinstance(state, Starting | Ready) else None,
        attempt=state.run.attempt,
        rung=rung.name,
        degraded=isinstance(state, Ready) and rung != BASE,
        degradation=_degradation(state, policy),
        changes=() if idle else _changes(rung, policy),
        cost="" if idle else rung.cost,
        phase=_phase(state),
        elapsed_s=at - _since(state, at),
        quiet_s=heart.quiet_s if heart is not None and isinstance(state, Starting) else None,
        patience_s=patience_s,
        shards=heart.shards if heart else None,
        graphs=heart.graphs if heart else None,
        gpus=tuple(
            GpuStatus(
                uuid=gpu.uuid,
                used_bytes=gpu.used_bytes,
                utilisation_percent=gpu.utilisation_percent,
                total_bytes=gpu.total_bytes,
                entry=next((entry for entry, uuid in policy.uuids.items() if uuid == gpu.uuid), ""),
            )
            for gpu in (heart.gpus if heart else ())
        ),
        gpus_unobserved=heart.gpus_unobserved if heart else "",
        gpu_faults=heart.gpu_faults if heart else (),
        retry_in_s=max(0.0, state.until - at) if isinstance(state, Backoff) else None,
        processes=len(heart.processes) if heart else 0,
        lines_dropped=state.run.lines_dropped,
        attempts=(*(_ended(attempt, at) for attempt in state.run.ended), *_current(state, rung.name, at)),
        phases=seen.phases if seen else (),
        weights_percent=seen.weights_percent if seen else None,
        weights_bytes_per_s=seen.weights_bytes_per_s if seen else None,
        left_s=seen.left_s if seen else None,
        suspicion=seen.suspicion if seen else "",
        gpus_out=unusable.in_words(state.run),
        preflight=_preflight(state),
    )


def ladder(state: State, policy: Policy) -> tuple[RungStatus, ...]:
    """The rungs from the base on: those tried, the one that is current, and those that would follow it for causes that nobody
    knows."""
    run, here = state.run, state.run.rung
    if isinstance(state, Stopped):
        begins = known_good.begin(run.known, policy.ladder, boot=policy.boot, up_after=policy.up_after)
        sound = unusable.around(run.asked_anew(), begins.rung, policy)
        run, here = Run(out=run.out), sound if isinstance(sound, Rung) else begins.rung
    tried = [ended.rung for ended in state.run.ended if ended.diagnosis is not None]
    parts = [Rung(remedies=here.remedies[:count]) for count in range(1, len(here.remedies))]
    walked = [BASE, *(rung for rung in (*tried, *parts) if rung != here), here]
    before = [rung for number, rung in enumerate(walked) if rung not in walked[:number]]
    after = [step.rung for step in planning.walk(policy, run, here)]
    first = "next" if isinstance(state, Stopped) else "current"
    return tuple(
        RungStatus(name=rung.name, changes=_changes(rung, policy), cost=rung.cost, standing=standing)
        for rung, standing in (
            *((rung, first if rung == here else "tried" if rung in tried else "passed") for rung in before),
            *((rung, "next" if first == "current" and rung == after[0] else "later") for rung in after),
        )
    )


def _degradation(state: State, policy: Policy) -> Degradation | None:
    rung = state.run.rung
    if not isinstance(state, Ready) or rung == BASE:
        return None
    # Where it was forgotten on request it serves so all the same, until it is started anew.
    known = state.run.known
    return Degradation(
        since=known.since if known is not None else known_good.utc_text(policy.utc_s + state.since),
        cause=known.cause if known is not None else "",
        changes=_changes(rung, policy),
        cost=rung.cost,
        way_back=readiness.way_back(state.run),
    )


def _changes(rung: Rung, policy: Policy) -> tuple[str, ...]:
    return differences(policy.ladder.base, policy.launch(rung))


def state_name(state: State) -> str:
    """The state's name as people read it."""
    return type(state).__name__.lower()


def headline(state: State, policy: Policy, at: float) -> str:
    """One line that says it all: for STATUS= and the first line of `mgpuctl status`."""
    rung = state.run.rung
    where = f"attempt {state.run.attempt} on rung {rung.name}"
    match state:
        case Checking():
            return f"checking the GPUs before the load, {at - state.since:.0f} s, {where}"
        case Starting():
            quiet = f", quiet for {state.progress.quiet_s:.0f} s" if state.progress.quiet_s >= 3 else ""
            return f"loading: {outlook.of(state, policy, at).words}, {at - state.since:.0f} s, {where}{quiet}"
        case Ready() if rung != BASE:
            return f"ready, degraded: rung {rung.name} ({rung.cost}), attempt {state.run.attempt}"
        case Ready():
            return f"ready: {where}"
        case Terminating() | Killing():
            return f"ending {where}: {state.why}"
        case Backoff():
            return f"waiting {max(0.0, state.until - at):.0f} s before attempt {state.run.attempt + 1}{_last_failure(state.run)}"
        case Stopped():
            return "stopped: no engine runs; mgpuctl start starts it"
        case Failed():
            return state.message
        case _ as unreachable:
            assert_never(unreachable)


def _last_failure(run: Run) -> str:
    last = next((ended.diagnosis for ended in reversed(run.ended) if ended.diagnosis is not None), None)
    return f"; the last one: {last.summary}" if last else ""


def _phase(state: State) -> str:
    if isinstance(state, Starting):
        return state.progress.phase.label
    if isinstance(state, Checking):
        return "preflight"
    return "serving" if isinstance(state, Ready) else ""


def _preflight(state: State) -> str:
    """How the check of the GPUs went or goes, "" where there is nothing to be told."""
    if isinstance(state, Checking) or (isinstance(state, Starting) and state.checking):
        return "under way"
    checked = state.checked if isinstance(state, Starting) else None
    return "" if checked is None else transports.summary(checked)


def _since(state: State, at: float) -> float:
    return state.since if isinstance(state, Checking | Starting | Ready | Killing) else at


def _current(state: State, rung: str, at: float) -> tuple[AttemptStatus, ...]:
    if not isinstance(state, Checking | Starting | Ready):
        return ()
    begun = state.spawned_at if isinstance(state, Ready) else state.since
    outcome = "ready" if isinstance(state, Ready) else "running"
    return (
        AttemptStatus(
            number=state.run.attempt,
            rung=rung,
            outcome=outcome,
            phase=_phase(state),
            duration_s=at - begun,
            ended_ago_s=None,
            cause="",
            summary="",
            advice="",
            evidence=(),
        ),
    )


def _ended(ended: Ended, at: float) -> AttemptStatus:
    found = ended.diagnosis
    return AttemptStatus(
        number=ended.number,
        rung=ended.rung.name,
        outcome=ended.outcome,
        phase=ended.phase,
        duration_s=ended.duration_s,
        ended_ago_s=at - ended.ended_at,
        cause=found.cause if found else "",
        summary=found.summary if found else "",
        advice=found.advice if found else "",
        evidence=found.evidence if found else (),
        incident=ended.incident,
    )
