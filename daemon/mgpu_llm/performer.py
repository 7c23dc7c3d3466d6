"""Carry out what the core wants done. Whatever takes time goes on beside the loop and answers with an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, assert_never

import structlog

from mgpu_llm.adapters import nccl_debug
from mgpu_llm.adapters.engine import at_death, stacks
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.health import Probes
from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.chronicle import Chronicle
from mgpu_llm.collector import Collector, Launched
from mgpu_llm.core import launch
from mgpu_llm.core.effects import (
    AbandonIncident,
    BeginPreflight,
    EndPreflight,
    EngineEffect,
    KeepIncident,
    KillEngine,
    ProbeCompletion,
    ProbeHealth,
    SpawnEngine,
    TakeStacks,
    TerminateEngine,
)
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineGone,
    EngineSpawnFailed,
    Event,
    HealthProbed,
    IncidentKept,
    Preflighted,
    StacksTaken,
)
from mgpu_llm.core.launch import Server
from mgpu_llm.core.preflight import Checked
from mgpu_llm.gpu_baseline import Baseline
from mgpu_llm.observer import Observer
from mgpu_llm.remains import Remains

#: A look at the stacks is given up after this: the judgement waits for it a little longer, and not much.
STACKS_WITHIN_S: Final = 6.0

log = structlog.get_logger()


class Checker(Protocol):
    """Checks GPUs (`adapters.preflight`). Once a cancelled check has ended, nothing of it is left on them."""

    async def check(
        self,
        gpus: Mapping[str, str],
        environment: Mapping[str, str],
        transports: Mapping[str, Mapping[str, str]],
    ) -> Checked: ...

    def forget(self) -> None:
        """What has passed before passes no more."""


@dataclass(frozen=True, kw_only=True)
class Outside:
    """Everything about the engine that the loop reaches the world through. `server` and `environment` are what every launch
    starts from, `url` is where the engine shall listen, and `uuids` are the GPUs' by entry of CUDA_VISIBLE_DEVICES."""

    server: Server
    url: str
    environment: Mapping[str, str]
    engine: EngineProcess
    observer: Observer
    baseline: Baseline
    remains: Remains
    preflight: Checker
    uuids: Mapping[str, str]
    probes: Probes
    chronicle: Chronicle
    collector: Collector
    incidents: Incidents
    #: Where NCCL's own words of an attempt after a failed one go.
    nccl_folder: Path
    kill_deadline_s: float
    #: The Unix socket on which the engine listens, if it does: vLLM does not remove one that a killed engine left.
    engine_socket: Path | None
    #: Why the engine could not listen where it shall, "" if it could. May take a second.
    address_trouble: Callable[[], str]


class Performer:
    """`emit` takes the answers, `clock` gives monotonic seconds, `loading` tells whether the engine is not yet serving."""

    def __init__(
        self, outside: Outside, clock: Callable[[], float], emit: Callable[[Event], None], loading: Callable[[], bool]
    ) -> None:
        self._outside = outside
        self._clock = clock
        self._emit = emit
        self._loading = loading
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._noting: asyncio.Task[None] | None = None
        self._launched = Launched()
        self._keeping: asyncio.Task[None] | None = None
        self._checks: list[asyncio.Task[None]] = []
        self._failed_before = False

    async def carry_out(self, effect: EngineEffect) -> None:
        """Begin to do it, or do it where it takes no time."""
        match effect:
            case SpawnEngine():
                await self._spawn(effect)
            case BeginPreflight():
                before = self._ending_checks()
                self._checks.append(self.start(self._preflight(effect, before)))
            case EndPreflight():
                self._ending_checks()
            case TerminateEngine():
                self._outside.engine.terminate()
            case KeepIncident():
                self._keeping = self.start(self._keep_incident(effect))
            case AbandonIncident():
                if self._keeping is not None:
                    self._keeping.cancel()
            case KillEngine():
                self.start(self._kill(effect.attempt))
            case TakeStacks():
                self.start(self._take_stacks(effect.attempt))
            case ProbeHealth():
                self.start(self._probe_health(effect.attempt))
            case ProbeCompletion():
                self.start(self._probe_completion(effect.attempt))
            case _ as unreachable:
                assert_never(unreachable)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work beside the loop, whose failure `raise_failures` tells."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    def raise_failures(self) -> None:
        """Raise what a task of ours has failed with: the daemon would be blind or deaf without it."""
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def cancel(self) -> None:
        """End all that goes on beside the loop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _spawn(self, effect: SpawnEngine) -> None:
        outside = self._outside
        visible = effect.launch.gpus or ()
        if outside.engine.running:
            outside.engine.abandon()
        await outside.baseline.remember(visible)
        if lacking := outside.baseline.lacking(effect.needs_free):
            self._emit(EngineSpawnFailed(at=self._clock(), attempt=effect.attempt, reason=lacking[1], rank=lacking[0]))
            return
        await outside.remains.before_spawn(launch.environment(outside.environment, effect.launch))
        argv = launch.argv(outside.server, effect.launch)
        environment = at_death.asked_for(launch.environment(outside.environment, effect.launch))
        if effect.launch.gpus is not None and self._failed_before:
            environment = await asyncio.to_thread(nccl_debug.asked_for, environment, outside.nccl_folder)
        self._launched, self._failed_before = Launched(argv=argv, environment=environment), False
        log.info("engine.command", attempt=effect.attempt, argv=launch.shown(argv))
        # Two servers of one user may share a port (vLLM up to 0.20 sets SO_REUSEPORT): the other would get our probes.
        if why := await asyncio.to_thread(outside.address_trouble):
            reason = f"cannot listen on {outside.url}: {why}; free it, or set another engine.port"
            self._emit(EngineSpawnFailed(at=self._clock(), attempt=effect.attempt, reason=reason))
            return
        if outside.engine_socket is not None:
            outside.engine_socket.unlink(missing_ok=True)
        await outside.engine.spawn(effect.attempt, argv, environment)
        self._noting = self.start(outside.remains.watch())
        self._watch = self.start(
            outside.observer.watch(
                effect.attempt, visible, outside.engine.sample, self._loading, outside.engine.pressure
            )
        )

    async def _preflight(self, effect: BeginPreflight, before: Collection[asyncio.Task[None]]) -> None:
        outside = self._outside
        if before:
            await asyncio.wait(before)
        if effect.anew:
            outside.preflight.forget()
        environment = launch.environment(outside.environment, effect.launch)
        checked = await outside.preflight.check(
            {gpu: outside.uuids[gpu] for gpu in effect.gpus},
            outside.engine.marked(environment, effect.attempt),
            effect.transports,
        )
        self._emit(Preflighted(at=self._clock(), attempt=effect.attempt, checked=checked))

    def _ending_checks(self) -> list[asyncio.Task[None]]:
        """Those that are not yet over, which will be soon: up to a quarter of a minute where a process of one does not end, and
        the loop must go round meanwhile."""
        self._checks = [check for check in self._checks if not check.done()]
        for check in self._checks:
            check.cancel()
        return list(self._checks)

    async def _keep_incident(self, effect: KeepIncident) -> None:
        self._failed_before = True
        if await self._outside.collector.keep(effect, self._launched):
            self._emit(IncidentKept(at=self._clock(), attempt=effect.attempt, incident=effect.incident))

    async def _kill(self, attempt: int) -> None:
        for task in (self._watch, self._noting):
            if task is not None:
                task.cancel()
        if checks := self._ending_checks():
            await asyncio.wait(checks)
        if self._keeping is not None:
            await asyncio.wait({self._keeping})
            self._keeping = None
        if self._outside.engine.running:
            await self._outside.engine.kill(self._outside.kill_deadline_s)
            if not self._outside.engine.running:
                await self._outside.remains.gone()
        else:
            # It never came to be: nothing has to be ended, and the state machine waits for exactly this word.
            self._emit(EngineGone(at=self._clock(), attempt=attempt))

    async def _take_stacks(self, attempt: int) -> None:
        seen, unobserved = await stacks.take(self._outside.engine.pids(), STACKS_WITHIN_S)
        taken = StacksTaken(at=self._clock(), attempt=attempt, stacks=seen, unobserved=unobserved)
        self._launched = replace(self._launched, looks=(*self._launched.looks, taken)[-2:])
        self._emit(taken)

    async def _probe_health(self, attempt: int) -> None:
        answer = await self._outside.probes.health()
        self._emit(HealthProbed(at=self._clock(), attempt=attempt, healthy=answer.good, detail=answer.detail))

    async def _probe_completion(self, attempt: int) -> None:
        answer = await self._outside.probes.completion()
        self._emit(
            CompletionProbed(
                at=self._clock(), attempt=attempt, served=answer.good, detail=answer.detail, hopeless=answer.hopeless
            )
        )
