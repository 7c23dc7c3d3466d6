"""The only loop: events in, `supervisor.step`, effects out. It judges nothing itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, assert_never

import structlog

from mgpu_llm.adapters import journal
from mgpu_llm.adapters.console import Console
from mgpu_llm.adapters.control_socket import RefusedError
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.health import Probes
from mgpu_llm.adapters.systemd import SystemdNotifier
from mgpu_llm.core import engine_log, launch, report, supervisor
from mgpu_llm.core.effects import (
    Announce,
    Effect,
    Exit,
    ExtendTimeout,
    KillEngine,
    Level,
    NotifyReady,
    NotifyStopping,
    ProbeCompletion,
    ProbeHealth,
    SpawnEngine,
    TerminateEngine,
)
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineGone,
    EngineSpawnFailed,
    Event,
    HealthProbed,
    LineRead,
    RestartRequested,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.launch import Server
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Policy, Ready, State, Stopped
from mgpu_llm.core.status import RungStatus, Status
from mgpu_llm.observer import Observer

TICK_S: Final = 0.5

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Everything that the loop reaches the world through. All of it answers by putting events into the loop's queue."""

    engine: EngineProcess
    observer: Observer
    probes: Probes
    notifier: SystemdNotifier
    console: Console
    watchdog_interval_s: float | None
    #: The Unix socket on which the engine listens, if it does: vLLM does not remove one that a killed engine left.
    engine_socket: Path | None
    #: Why the engine could not listen where it shall, "" if it could. May take a second.
    address_trouble: Callable[[], str]


class Runner:
    """One daemon's life, and what the control socket asks of it (`control_socket.Backend`).

    `events` is the loop's queue, `clock` gives monotonic seconds, `environment` is what the engine inherits.
    """

    def __init__(
        self,
        policy: Policy,
        server: Server,
        identity: Identity,
        environment: Mapping[str, str],
        clock: Callable[[], float],
        events: asyncio.Queue[Event],
        outside: Outside,
    ) -> None:
        self._policy = policy
        self._server = server
        self._identity = identity
        self._environment = environment
        self._clock = clock
        self._events = events
        self._outside = outside
        self._state: State = Stopped()
        self._ended: Exit | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._fed_at = 0.0

    async def run(self) -> Exit:
        """Supervise until the core says Exit. A task of ours that fails ends the daemon: it would be blind or deaf."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._asked_to_end, number)
        self._start(self._tick())
        self._events.put_nowait(StartRequested(at=self._clock()))
        try:
            while self._ended is None:
                event = await self._events.get()
                self._retell(event)
                self._state, effects = supervisor.step(self._state, event, self._policy)
                for effect in effects:
                    await self._carry_out(effect)
                if isinstance(event, Ticked):
                    self._show()
                self._raise_failures()
            return self._ended
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._ended is None:
                # A fault of ours: an engine that nobody watches any more must not go on holding port and GPUs.
                await self._outside.engine.kill(self._policy.kill_deadline_s)

    def status(self) -> Status:
        return report.status(self._state, self._policy, self._clock(), self._identity)

    def rungs(self) -> tuple[RungStatus, ...]:
        return report.ladder(self._state, self._policy)

    def engine_lines(self, count: int) -> tuple[str, ...]:
        return self._outside.engine.tail.last(count)

    def request(self, verb: str, by: str) -> str:
        """Take up start, stop or restart. Raises RefusedError when that cannot be done now."""
        at, now = self._clock(), report.state_name(self._state)
        if self._ended is not None:
            raise RefusedError("cannot do that: the daemon is ending")
        log.info("control.request", verb=verb, by=by, state=now)
        match verb:
            # Also where there seems to be nothing to do: what was asked just before may still lie in the queue.
            case "start":
                self._events.put_nowait(StartRequested(at=at))
                if now in ("starting", "ready"):
                    return f"nothing to do: the engine is {now} already"
            case "stop":
                self._events.put_nowait(StopRequested(at=at, final=False, by=by))
                if now == "stopped":
                    return "nothing to do: no engine runs"
            case _:
                self._events.put_nowait(RestartRequested(at=at, by=by))
        return f"{verb} is under way"

    def _asked_to_end(self, number: signal.Signals) -> None:
        self._events.put_nowait(StopRequested(at=self._clock(), final=True, by=number.name))

    def _retell(self, event: Event) -> None:
        if isinstance(event, LineRead):
            line = engine_log.parse(event.text)
            # Our own probes, every few seconds for months, would bury everything else.
            level = Level.DEBUG if engine_log.is_chatter(line.message) else line.level
            journal.engine_line(line.process, line.message, level)

    async def _carry_out(self, effect: Effect) -> None:
        outside = self._outside
        match effect:
            case Announce():
                log.log(journal.LEVELS[effect.level], effect.name, **effect.facts)
            case SpawnEngine():
                await self._spawn(effect)
            case TerminateEngine():
                outside.engine.terminate()
            case KillEngine():
                self._start(self._kill(effect.attempt))
            case ProbeHealth():
                self._start(self._probe_health(effect.attempt))
            case ProbeCompletion():
                self._start(self._probe_completion(effect.attempt))
            case NotifyReady():
                outside.notifier.status(report.headline(self._state, self._policy, self._clock()))
                outside.notifier.ready()
            case ExtendTimeout():
                outside.notifier.extend_timeout(effect.seconds)
            case NotifyStopping():
                outside.notifier.stopping()
            case Exit():
                self._ended = effect
            case _ as unreachable:
                assert_never(unreachable)

    async def _spawn(self, effect: SpawnEngine) -> None:
        outside = self._outside
        visible = effect.launch.gpus or ()
        await outside.observer.remember(visible)
        argv = launch.argv(self._server, effect.launch)
        environment = launch.environment(self._environment, effect.launch)
        log.info("engine.command", attempt=effect.attempt, argv=launch.shown(argv))
        # Two servers of one user may share a port (vLLM up to 0.20 sets SO_REUSEPORT): the other would get our probes.
        if why := await asyncio.to_thread(outside.address_trouble):
            reason = f"cannot listen on {self._identity.url}: {why}; free it, or set another engine.port"
            self._events.put_nowait(
                EngineSpawnFailed(at=self._clock(), attempt=effect.attempt, reason=reason, hopeless=False)
            )
            return
        if outside.engine_socket is not None:
            outside.engine_socket.unlink(missing_ok=True)
        await outside.engine.spawn(effect.attempt, argv, environment)
        watching = outside.observer.watch(effect.attempt, visible, outside.engine.sample, self._loading)
        self._watch = self._start(watching)

    async def _kill(self, attempt: int) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._outside.engine.running:
            await self._outside.engine.kill(self._policy.kill_deadline_s)
        else:
            # It never came to be: nothing has to be ended, and the state machine waits for exactly this word.
            self._events.put_nowait(EngineGone(at=self._clock(), attempt=attempt))

    async def _probe_health(self, attempt: int) -> None:
        answer = await self._outside.probes.health()
        self._events.put_nowait(
            HealthProbed(at=self._clock(), attempt=attempt, healthy=answer.good, detail=answer.detail)
        )

    async def _probe_completion(self, attempt: int) -> None:
        answer = await self._outside.probes.completion()
        self._events.put_nowait(
            CompletionProbed(
                at=self._clock(), attempt=attempt, served=answer.good, detail=answer.detail, hopeless=answer.hopeless
            )
        )

    async def _tick(self) -> None:
        while True:
            self._events.put_nowait(Ticked(at=self._clock()))
            await asyncio.sleep(TICK_S)

    def _show(self) -> None:
        """Once a tick, after the whole pass: what people see, and to systemd the proof that the loop goes round."""
        outside, status = self._outside, self.status()
        outside.notifier.status(status.headline)
        outside.console.show(status)
        interval_s = outside.watchdog_interval_s
        if interval_s is not None and self._clock() - self._fed_at >= interval_s - TICK_S:
            outside.notifier.watchdog()
            self._fed_at = self._clock()

    def _loading(self) -> bool:
        return not isinstance(self._state, Ready)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    def _raise_failures(self) -> None:
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
