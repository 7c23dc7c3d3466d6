"""An engine has come to service: what is told, and what is remembered of how it came there."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mgpu_llm.core import known_good
from mgpu_llm.core.diagnosis import TAKEN
from mgpu_llm.core.effects import Announce, Effect, Level, NotifyReady, RememberRung, RememberStart
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.launch import differences
from mgpu_llm.core.states import Policy, Ready, Run, Starting

#: How an engine that serves on a rung of ours comes back to the admin's own settings.
WAY_BACK: Final = "remove the cause, then: mgpuctl forget && mgpuctl restart"
#: The same where that is not remembered: somebody wants it forgotten, or others held a GPU.
FORGOTTEN: Final = "it is not remembered: the next start begins with your settings (mgpuctl restart)"
#: The same where a GPU is out.
OUT: Final = "reset the GPU that is out, or reboot the host, then restart this service with systemctl"


def served(state: Starting, at: float, policy: Policy) -> tuple[Ready, tuple[Effect, ...]]:
    """A completion has come back."""
    rung, known = state.run.rung, _known(state.run, at, policy)
    ready = Ready(
        run=replace(state.run, tries=0, trial=None, known=known),
        since=at,
        spawned_at=state.since,
        progress=state.progress,
        pid=state.pid,
        probe_at=at + policy.probe_interval_s,
    )
    facts: dict[str, object] = {
        "attempt": state.run.attempt,
        "rung": rung.name,
        "after_s": round(at - state.since, 1),
    }
    announced = [Announce(name="engine.ready", facts=facts)]
    if rung != BASE:
        lost = {
            "rung": rung.name,
            "changes": "; ".join(differences(policy.ladder.base, policy.launch(rung))),
            "cost": rung.cost,
            "since": known.since if known is not None else known_good.utc_text(policy.utc_s + at),
            "cause": known.cause if known is not None else "",
            "way_back": way_back(ready.run),
        }
        announced.append(Announce(name="engine.degraded", level=Level.WARNING, facts=lost))
    remembered = () if known == state.run.known else (RememberRung(known=known),)
    return ready, (*announced, NotifyReady(), *remembered, _remembered(state, at, policy))


def way_back(run: Run) -> str:
    """What brings a service on a rung of ours back to the admin's own settings."""
    if run.out:
        return OUT
    return WAY_BACK if run.known is not None else FORGOTTEN


def _known(run: Run, at: float, policy: Policy) -> KnownGood | None:
    """A rung of ours that was not remembered was come to by the failures before it, unless it was only tried. What somebody has
    asked to be forgotten stays so until the next planned start, whatever serves until then."""
    if run.forgotten:
        return None
    failed = [ended.diagnosis.cause for ended in run.ended if ended.diagnosis is not None]
    # After deaths the last one counts: this is the first attempt since then.
    causes = failed[-max(run.tries - 1, 1) :] if run.trial is None else []
    if causes and set(causes) == {TAKEN}:
        return run.known  # who held a GPU may be gone by the next start
    return known_good.served(
        run.known,
        run.rung,
        causes=tuple(causes),
        key=policy.key,
        utc_s=policy.utc_s + at,
        boot=policy.boot,
    )


def _remembered(state: Starting, at: float, policy: Policy) -> RememberStart:
    heart = state.progress
    return RememberStart(
        launch=policy.history_key(state.run.rung),
        duration_s=at - state.since,
        phase_s={phase.label: end - since for phase, since, end in heart.spans(at)},
        quiet_s={phase.label: quiet_s for phase, quiet_s in heart.longest_quiet.items()},
    )
