"""The only loop: events in, `supervisor.step`, effects out. It judges nothing itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import structlog

from mgpu_llm.adapters import journal
from mgpu_llm.adapters.console import Console
from mgpu_llm.adapters.control_socket import RefusedError, UnknownError, WrongConfigError
from mgpu_llm.adapters.engine.aside import answered, aside
from mgpu_llm.adapters.gpus import GpusUnobserved
from mgpu_llm.adapters.incidents import NoIncidentError
from mgpu_llm.adapters.systemd import SystemdNotifier
from mgpu_llm.core import engine_log, in_use, metrics, report, supervisor, tally, unusable, whereabouts
from mgpu_llm.core.effects import (
    Announce,
    Effect,
    Exit,
    ExtendTimeout,
    Level,
    NotifyReady,
    NotifyStopping,
    RememberRung,
    RememberStart,
)
from mgpu_llm.core.events import (
    Event,
    ForgetRequested,
    LineRead,
    RestartRequested,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Policy, Ready, Run, State, Stopped
from mgpu_llm.core.status import RungStatus, Status
from mgpu_llm.gpu_json import GpuReport
from mgpu_llm.performer import Outside, Performer
from mgpu_llm.plan_json import plan_to_json
from mgpu_llm.reloading import Reloading

TICK_S: Final = 0.5
#: mgpuctl waits 5 s for an answer.
READ_S: Final = 4.0
#: Of that the driver gets so much, and the list of the engine's processes; the rest is for their names.
DRIVER_S: Final = 2.5
PIDS_S: Final = 0.5
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Audience:
    """Who is told what the daemon does, beside the journal."""

    notifier: SystemdNotifier
    console: Console
    watchdog_interval_s: float | None


class Runner:
    """One daemon's life, and what the control socket asks of it (`control_socket.Backend`).

    `events` is the loop's queue, `clock` gives monotonic seconds; everything in `outside` answers by putting events into
    the queue. `reloading` reads the config again. `out` are GPUs that must not be used from the beginning, by entry of
    CUDA_VISIBLE_DEVICES, each with why.
    """

    def __init__(
        self,
        policy: Policy,
        identity: Identity,
        clock: Callable[[], float],
        events: asyncio.Queue[Event],
        outside: Outside,
        audience: Audience,
        report: GpuReport,
        reloading: Reloading,
        out: Mapping[str, str],
    ) -> None:
        self._policy = policy
        self._identity = identity
        self._clock = clock
        self._events = events
        self._outside = outside
        self._audience = audience
        self._report = report
        self._reloading = reloading
        self._one_reload_at_a_time = asyncio.Lock()
        self._performer = Performer(outside, clock, events.put_nowait, self._loading)
        run, self._out_told = unusable.noted(Run(known=outside.chronicle.known), out)
        self._state: State = Stopped(run=run)
        self._tally = tally.Tally()
        self._ended: Exit | None = None
        self._fed_at = 0.0
        self._tell_the_time()

    async def run(self) -> Exit:
        """Supervise until the core says Exit. A task of ours that fails ends the daemon: it would be blind or deaf."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A terminal that is closed says SIGHUP too: whoever sat there is gone, and would not know what goes on.
            reloads = number == signal.SIGHUP and not self._audience.console.is_terminal
            loop.add_signal_handler(number, self._asked_to_reload if reloads else self._asked_to_end, number)
        for told in self._out_told:
            await self._carry_out(told)
        self._performer.start(self._tick())
        self._events.put_nowait(StartRequested(at=self._clock()))
        try:
            while self._ended is None:
                event = await self._events.get()
                self._retell(event)
                if isinstance(event, Ticked):
                    self._tell_the_time()
                before = self._state
                self._state, effects = supervisor.step(before, event, self._policy)
                journal.about(whereabouts.of(self._state))
                self._tally = tally.stepped(self._tally, before, self._state, event.at)
                self._outside.chronicle.stepped(before, event, self._state, self._policy)
                for effect in effects:
                    await self._carry_out(effect)
                if isinstance(event, Ticked):
                    self._show()
                self._performer.raise_failures()
            return self._ended
        finally:
            await self._performer.cancel()
            if self._ended is None:
                # A fault of ours: an engine that nobody watches any more must not go on holding port and GPUs.
                await self._outside.engine.kill(self._policy.kill_deadline_s)

    def status(self) -> Status:
        return report.status(self._state, self._policy, self._clock(), self._identity)

    def rungs(self) -> tuple[RungStatus, ...]:
        return report.ladder(self._state, self._policy)

    def metrics(self) -> Iterator[tuple[metrics.Family, metrics.Values]]:
        return metrics.read(self._state, self._policy, self._clock(), self._identity, self._tally)

    def plan(self, cause: str) -> dict[str, Any]:
        known = self._state.run.known
        begins = {"rung": known.rung, "since": known.since} if known is not None else None
        return {**plan_to_json(self._policy, cause, self._state.run.out), "begins": begins}

    def engine_lines(self, count: int) -> tuple[str, ...]:
        return self._outside.engine.tail.last(count)

    async def gpus(self) -> dict[str, Any]:
        pids = await aside(self._outside.engine.pids, PIDS_S)
        uuids = self._policy.uuids
        visible = self._policy.launch(self._state.run.rung).gpus or () if self._outside.engine.running else ()
        try:
            return await self._report.document(
                DRIVER_S,
                configured=(*uuids.values(), *self._state.run.out),
                in_use=[uuids[entry] for entry in visible if entry in uuids],
                engine=pids or (),
            )
        except GpusUnobserved as silence:
            raise RefusedError(silence.reason) from None

    async def incidents(self) -> list[dict[str, Any]]:
        return await _read(self._outside.incidents.listed)

    async def incident(self, wanted: str) -> dict[str, Any]:
        return await _read(lambda: self._outside.incidents.document(wanted))

    async def incident_archive(self, wanted: str) -> tuple[str, bytes]:
        return await _read(lambda: self._outside.incidents.archive(wanted))

    async def reload(self, by: str) -> dict[str, Any]:
        try:
            if self._ended is not None:
                raise RefusedError("cannot reload: the daemon is ending")
            async with self._one_reload_at_a_time:
                wanted = await self._reloading.read()
                # No event is taken up from here on: the next one, and a recording that is under way, find the new policy.
                self._policy, done = self._reloading.apply(wanted, self._policy, in_use.areas(self._state))
                self._outside.chronicle.reloaded(self._state, self._policy, self._clock())
        except (RefusedError, WrongConfigError) as failure:
            log.error("config.reload-failed", by=by, why=str(failure), consequence="nothing has changed")
            raise
        log.info("config.reloaded", by=by, applied=done.applied, needs_restart=done.needs_restart)
        return {"applied": done.applied, "needs_restart": done.needs_restart}

    def request(self, verb: str, by: str) -> str:
        """Take up start, stop, restart or forget. Raises RefusedError when that cannot be done now."""
        at, now = self._clock(), report.state_name(self._state)
        if self._ended is not None:
            raise RefusedError("cannot do that: the daemon is ending")
        log.info("control.request", verb=verb, by=by, state=now)
        match verb:
            # Also where there seems to be nothing to do: what was asked just before may still lie in the queue.
            case "start":
                self._events.put_nowait(StartRequested(at=at))
                if now in ("checking", "starting", "ready"):
                    return f"nothing to do: the engine is {now} already"
            case "stop":
                self._events.put_nowait(StopRequested(at=at, final=False, by=by))
                if now == "stopped":
                    return "nothing to do: no engine runs"
            case "forget":
                self._events.put_nowait(ForgetRequested(at=at, by=by))
                return self._forgotten()
            case _:
                self._events.put_nowait(RestartRequested(at=at, by=by))
        return f"{verb} is under way"

    def _forgotten(self) -> str:
        known = self._state.run.known
        if known is None:
            return "nothing to do: no rung is remembered"
        begins = "the next start begins with your settings: mgpuctl restart"
        return f"forgotten: rung {known.rung}, which has served since {known.since}; {begins}"

    def _asked_to_end(self, number: signal.Signals) -> None:
        self._events.put_nowait(StopRequested(at=self._clock(), final=True, by=number.name))

    def _asked_to_reload(self, number: signal.Signals) -> None:
        async def reload() -> None:
            with suppress(RefusedError, WrongConfigError):  # the journal has it
                await self.reload(number.name)

        self._performer.start(reload())

    def _retell(self, event: Event) -> None:
        if isinstance(event, LineRead):
            line = engine_log.parse(event.text)
            # Our own probes, every few seconds for months, would bury everything else.
            level = Level.DEBUG if engine_log.is_chatter(line.message) else line.level
            journal.engine_line(line.process, line.message, level, event.attempt)

    async def _carry_out(self, effect: Effect) -> None:
        notifier = self._audience.notifier
        match effect:
            case Announce():
                log.log(journal.LEVELS[effect.level], effect.name, **effect.facts)
            case NotifyReady():
                notifier.status(report.headline(self._state, self._policy, self._clock()))
                notifier.ready()
            case ExtendTimeout():
                notifier.extend_timeout(effect.seconds)
            case NotifyStopping():
                notifier.stopping()
            case RememberStart():
                self._outside.chronicle.remember(effect)
                self._policy = replace(self._policy, past=self._outside.chronicle.past)
            case RememberRung():
                self._outside.chronicle.remember_rung(effect.known)
            case Exit():
                self._ended = effect
            case _:
                await self._performer.carry_out(effect)

    def _tell_the_time(self) -> None:
        """The wall clock for names and dates, which the core has not; again and again, because it may be set."""
        self._policy = replace(self._policy, utc_s=datetime.now(UTC).timestamp() - self._clock())

    async def _tick(self) -> None:
        while True:
            self._events.put_nowait(Ticked(at=self._clock()))
            await asyncio.sleep(TICK_S)

    def _show(self) -> None:
        """Once a tick, after the whole pass: what people see, and to systemd the proof that the loop goes round."""
        audience, status = self._audience, self.status()
        audience.notifier.status(status.headline)
        audience.console.show(status)
        interval_s = audience.watchdog_interval_s
        if interval_s is not None and self._clock() - self._fed_at >= interval_s - TICK_S:
            audience.notifier.watchdog()
            self._fed_at = self._clock()

    def _loading(self) -> bool:
        return not isinstance(self._state, Ready)


async def _read(work: Callable[[], T]) -> T:
    """What `work` finds on the disk, within what a client waits."""
    try:
        return await answered(work, READ_S)
    except NoIncidentError as error:
        raise UnknownError(str(error)) from None
    except TimeoutError:
        raise RefusedError(f"cannot read the incidents: the disk has not answered for {READ_S:g} s") from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"cannot read the incident: {error}") from None
