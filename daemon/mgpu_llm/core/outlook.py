"""How far a load has come, and how long it will take: from what is counted now and from this host's last start like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mgpu_llm.core import judging, stall, weights
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.history import PastStart, usual
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.states import Policy, Starting
from mgpu_llm.core.status import Count, PhaseStatus
from mgpu_llm.core.suspicion import Finding

#: From this quiet on a load is not said to come nearer. Longer than most quiets of healthy starts.
STANDING_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What there is to tell of a load, in the terms of core/status; `words` is the whole of it in short."""

    words: str
    phases: tuple[PhaseStatus, ...]
    weights_percent: float | None
    weights_bytes_per_s: float | None
    left_s: float | None
    suspicion: str


def of(state: Starting, policy: Policy, at: float) -> Outlook:
    """The outlook at `at`, seconds on the clock of the events."""
    heart = state.progress
    past = usual(policy.past, policy.history_key(state.run.rung))
    coming = heart.weights if heart.phase is Phase.WEIGHTS else None
    total = heart.weights_bytes or 0
    percent = weights.percent(coming, total) if coming else None
    if percent is None and heart.phase is Phase.WEIGHTS:
        percent = _percent(heart.shards)
    rate = weights.bytes_per_s(coming) if coming else None
    left = _left_s(heart, weights.left_s(coming, total) if coming else None, past, at)
    return Outlook(
        words=_words(heart, percent, rate, left),
        phases=tuple(_phase(phase, heart, policy, past, percent, at) for phase in Phase),
        weights_percent=percent,
        weights_bytes_per_s=rate,
        left_s=left,
        suspicion=_suspicion(state, policy),
    )


def _phase(
    phase: Phase, heart: Progress, policy: Policy, past: PastStart | None, weights_percent: float | None, at: float
) -> PhaseStatus:
    began = heart.phase_began.get(phase)
    after = [since for later, since in heart.phase_began.items() if later > phase]
    current = phase is heart.phase
    counted = {Phase.WEIGHTS: weights_percent, Phase.WARM_UP: _percent(heart.graphs)}.get(phase) if current else None
    allowed = policy.allowed[phase]
    return PhaseStatus(
        name=phase.label,
        # A phase may be passed over: an eager engine compiles nothing.
        standing="current" if current else "done" if phase < heart.phase else "to-come",
        took_s=None if began is None else min(after, default=at) - began,
        usual_s=past.phase_s.get(phase.label) if past else None,
        percent=counted,
        patience_s=allowed,
        learnt=allowed > policy.patience[phase],
    )


def _left_s(heart: Progress, weights_left_s: float | None, past: PastStart | None, at: float) -> float | None:
    """Until it serves. Without a start like it to go by, only the rest of the weights can be told; and while nothing moves,
    nothing: a clock that counts down beside an engine that stands still would be a lie."""
    if heart.quiet_s >= STANDING_S:
        return None
    if past is None:
        return weights_left_s
    here = max(past.phase_s.get(heart.phase.label, 0.0) - (at - heart.phase_began[heart.phase]), 0.0)
    if weights_left_s is not None:
        here = weights_left_s
    return here + sum(past.phase_s.get(phase.label, 0.0) for phase in Phase if phase > heart.phase)


def _words(heart: Progress, percent: float | None, rate: float | None, left_s: float | None) -> str:
    parts = [heart.phase.label]
    if percent is not None:
        parts[0] += f" {percent:.0f} %"
    if heart.phase is Phase.WEIGHTS and heart.shards is not None:
        parts.append(f"shards {heart.shards.done}/{heart.shards.total}")
    if heart.graphs is not None:
        parts.append(f"graphs {heart.graphs.done}/{heart.graphs.total}")
    if rate is not None:
        parts.append(f"{rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s")
    if left_s is not None:
        parts.append(f"about {_span(left_s)} left")
    return ", ".join(parts)


def _span(seconds: float) -> str:
    """Rounded as an estimate is worth: 40 s, 9 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(round(seconds / 5) * 5, 5)} s" if seconds >= 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _percent(count: Count | None) -> float | None:
    return 100.0 * min(count.done / count.total, 1.0) if count is not None and count.total else None


def _suspicion(state: Starting, policy: Policy) -> str:
    found = state.suspicion
    if found is None:
        return ""
    quiet = f"suspected: nothing has moved for {state.progress.quiet_s:.0f} s"
    if found.finding is not Finding.BLIND:
        return f"{quiet}; looking where its threads stand"
    allowed_s = stall.patience_now(state.progress, policy.allowed, judging.circumstances(state, policy))
    until_s = state.progress.cleared_s + allowed_s * stall.UNCONFIRMED_FACTOR
    return f"{quiet}, and its stacks prove nothing ({found.blind}); it is ended at {until_s:.0f} s"
