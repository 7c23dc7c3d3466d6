"""What of a life is kept: a recording of each load with how it ended, what the starts that came to service have needed, and
the rung on which the last one did."""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from mgpu_llm.adapters.memory.history import History
from mgpu_llm.adapters.memory.known_good import KnownGoodRung
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.core import recorded_policy, recording
from mgpu_llm.core.effects import RememberStart
from mgpu_llm.core.events import EngineExited, Event
from mgpu_llm.core.history import PastStart
from mgpu_llm.core.known_good import KnownGood, changes
from mgpu_llm.core.recording import Row
from mgpu_llm.core.states import Policy, Ready, Starting, State

log = structlog.get_logger()


class Chronicle:
    """Belongs to the loop; no part of it waits for the disk. `model` is what the history calls it."""

    def __init__(self, recorder: Recorder, history: History, known_good: KnownGoodRung, model: str) -> None:
        self._recorder = recorder
        self._history = history
        self._known_good = known_good
        self._model = model

    @property
    def past(self) -> tuple[PastStart, ...]:
        """The starts that came to service, the newest last."""
        return self._history.starts

    @property
    def known(self) -> KnownGood | None:
        """The rung on which the last start came to service, None for the base."""
        return self._known_good.known

    def forget_outdated(self, policy: Policy) -> None:
        """Before the first start of a life: a rung is no longer known to be good where something that it depends on has
        changed, or where the ladder has it no more."""
        known = self.known
        if known is None or not (outdated := _outdated(known, policy)):
            return
        log.info("rung.forgotten", rung=known.rung, since=known.since, **outdated)
        self.remember_rung(None)

    def stepped(self, before: State, event: Event, after: State, policy: Policy) -> None:
        """To be told of every step: the event goes into the recording of the load that it belongs to."""
        if isinstance(before, Starting):
            self._recorder.take(event)
            if not isinstance(after, Starting):
                self._recorder.end(*_ending(before, event, after))
        if isinstance(after, Starting) and not isinstance(before, Starting):
            self._recorder.begin(after.run.attempt, after.since, recorded_policy.header(policy, after.run))

    def reloaded(self, state: State, policy: Policy, now: float) -> None:
        """From `now` on another policy holds: a load that is under way is judged by it."""
        self._recorder.note(now, lambda t: recorded_policy.reloaded(policy, state.run, t))

    def remember(self, start: RememberStart) -> None:
        """Keep what a start has needed that came to service now."""
        self._history.remember(
            PastStart(
                launch=start.launch,
                model=self._model,
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                duration_s=start.duration_s,
                phase_s=start.phase_s,
                quiet_s=start.quiet_s,
            )
        )

    def remember_rung(self, known: KnownGood | None) -> None:
        """Keep with which rung the next start shall begin, None: with the base."""
        self._known_good.remember(known)

    def recording(self, attempt: int) -> str:
        """The name of the last attempt's recording, "" where there is none."""
        return self._recorder.name(attempt)

    def close(self) -> None:
        """Finish what is being written; waits a few seconds at most."""
        self._known_good.close()
        self._history.close()
        self._recorder.close()  # what that has not finished the next daemon finishes


def _outdated(known: KnownGood, policy: Policy) -> dict[str, str]:
    """Why the rung must not be used any more, as facts for the log; none where it may."""
    if changed := changes(known, policy.key):
        return {"changed": "; ".join(changed)}
    try:
        policy.ladder.rung(known.rung)
    except ValueError as error:
        return {"why": str(error)}
    return {}


def _ending(before: Starting, event: Event, after: State) -> tuple[str, tuple[Row, ...]]:
    """How the load ended in one word, and the recording's closing rows."""
    t = event.at - before.since
    if isinstance(after, Ready):
        return "healthy", (recording.note(t, "healthy"), recording.note(t, "outcome", outcome="healthy"))
    end = (
        recording.note(t, "exit", rc=event.status) if isinstance(event, EngineExited) else recording.note(t, "stopping")
    )
    ended = after.run.ended[-1]
    told: dict[str, object] = {"outcome": ended.outcome, "phase": ended.phase}
    if ended.diagnosis is not None:
        told |= {"cause": ended.diagnosis.cause, "summary": ended.diagnosis.summary}
    return ended.outcome, (end, recording.note(t, "outcome", **told))
