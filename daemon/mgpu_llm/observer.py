"""Watch one engine from outside: its processes through /proc and its GPUs through NVML, at the pace of its state, and hear what
the kernel says meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import structlog

from mgpu_llm.adapters.engine.aside import answered
from mgpu_llm.adapters.engine.pressure import Pressure
from mgpu_llm.adapters.gpus import GpuReading, Gpus
from mgpu_llm.adapters.gpus import GpusUnobserved as DriverSilent
from mgpu_llm.adapters.host.kernel_follower import Followed
from mgpu_llm.adapters.host.program import Unanswered
from mgpu_llm.core import kernel
from mgpu_llm.core.events import (
    EngineEvent,
    EngineExited,
    Event,
    GpuSample,
    GpusSampled,
    GpusUnobserved,
    HostSampled,
    KernelSaid,
    ProcessesSampled,
    ProcessSample,
)
from mgpu_llm.gpu_health import HealthWatch

#: Seconds between samples. While loading, the longest healthy quiet is about 2 s, so that a few samples fall into it, and
#: a look may take about 4 ms of processor time (tests/bench/sampler_cost.py), so that all looks are less than 1 % of a core.
LOADING_EVERY_S: Final = 0.5
SERVING_EVERY_S: Final = 5.0
#: Pressure is an average of ten seconds, made anew by the kernel every two.
HOST_EVERY_S: Final = 2.0
#: /proc answers within milliseconds. A process that is stuck in the kernel may hold the one lock that it needs.
LOOK_WITHIN_S: Final = 5.0
FOR_EVER_S: Final = 1e9
#: An engine that ends is told after so many readings of what the kernel has said by then: some thousand records.
LAST_READINGS: Final = 25

T = TypeVar("T")

log = structlog.get_logger()


class Observer:
    """`uuids` maps the entries of CUDA_VISIBLE_DEVICES to NVML's UUIDs; `clock` gives monotonic seconds. `follow` opens the
    kernel's messages, in a thread (`kernel_follower.follow`); without it nobody listens to the kernel."""

    def __init__(
        self,
        gpus: Gpus,
        uuids: Mapping[str, str],
        clock: Callable[[], float],
        emit: Callable[[Event], None],
        follow: Callable[[], Followed] | None = None,
    ) -> None:
        self._gpus = gpus
        self._uuids = uuids
        self._clock = clock
        self._emit = emit
        self._follow = follow
        self._deaf = False
        self._ear: _Ear | None = None

    def tell(self, event: EngineEvent) -> None:
        """Hand on what the engine's process tells. The kernel says whom it kills before it does, and both may be there to be read
        at the same moment: of its end after what the kernel has said by then."""
        if isinstance(event, EngineExited) and self._ear is not None:
            self._ear.hear_all()
        self._emit(event)

    async def watch(
        self,
        attempt: int,
        visible: Sequence[str],
        sample: Callable[[], tuple[ProcessSample, ...]],
        loading: Callable[[], bool],
        pressure: Callable[[], Pressure] | None = None,
    ) -> None:
        """Sample until cancelled. The kinds of samples do not wait for each other: a silent driver must not hide what the
        processes do. `sample` and `pressure` are called in worker threads; pressure is told of while loading."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_processes(attempt, sample, loading))
            if pressure is not None:
                group.create_task(self._watch_host(attempt, pressure, loading))
            if self._follow is not None:
                group.create_task(self._listen(attempt, visible, self._follow))
            if visible:
                entries = dict(zip(self._named(visible), visible, strict=True))
                health = HealthWatch(attempt, entries, self._gpus.health, self._clock, self._emit)
                group.create_task(health.run())
                group.create_task(self._watch_gpus(attempt, self._named(visible), loading, health.hurry))

    async def _watch_processes(
        self, attempt: int, sample: Callable[[], tuple[ProcessSample, ...]], loading: Callable[[], bool]
    ) -> None:
        look = _Look(sample)
        try:
            while True:
                processes = await look.answer()
                if processes is not None:
                    self._emit(ProcessesSampled(at=self._clock(), attempt=attempt, processes=processes))
                await asyncio.sleep(_pace_s(loading))
        finally:
            look.leave()

    async def _watch_host(self, attempt: int, pressure: Callable[[], Pressure], loading: Callable[[], bool]) -> None:
        look = _Look(pressure)
        try:
            while True:
                if loading() and (found := await look.answer()) is not None:
                    memory, storage = found
                    now = self._clock()
                    self._emit(HostSampled(at=now, attempt=attempt, memory_percent=memory, storage_percent=storage))
                await asyncio.sleep(HOST_EVERY_S)
        finally:
            look.leave()

    async def _watch_gpus(
        self, attempt: int, uuids: Sequence[str], loading: Callable[[], bool], silent: Callable[[], None]
    ) -> None:
        """`silent` is called whenever nothing can be read that could before: one GPU that is lost is enough for that."""
        seen = True
        while True:
            try:
                readings = await self._gpus.read(uuids, processes=loading())
            except DriverSilent as silence:
                self._emit(GpusUnobserved(at=self._clock(), attempt=attempt, reason=silence.reason))
                if seen:
                    silent()
                seen = False
            else:
                seen = True
                self._emit(GpusSampled(at=self._clock(), attempt=attempt, gpus=tuple(map(_sample, readings))))
            await asyncio.sleep(_pace_s(loading))

    async def _listen(self, attempt: int, visible: Sequence[str], follow: Callable[[], Followed]) -> None:
        """Hear the kernel until cancelled, or until there is nothing to be heard any more: that is told once in our life."""
        try:
            followed = await _opened(follow)
        except (Unanswered, TimeoutError) as silence:
            self._tell_deaf(str(silence) or "no thread can be started")
            return
        loop = asyncio.get_running_loop()
        self._ear = ear = _Ear(attempt, followed, self._clock, self._emit)
        loop.add_reader(followed, ear.hear)
        try:
            if visible:
                with contextlib.suppress(DriverSilent):  # then every GPU may be ours
                    ear.addresses = dict(zip(visible, await self._gpus.addresses(self._named(visible)), strict=True))
            await ear.ended.wait()
            self._tell_deaf(followed.ended)
        finally:
            self._ear = None
            loop.remove_reader(followed)
            followed.close()

    def _tell_deaf(self, why: str) -> None:
        if not self._deaf:
            self._deaf = True
            consequence = "Xid errors, IOMMU faults and oom-kills explain no failure"
            log.info("kernel.unobserved", why=why, consequence=consequence)

    def _named(self, visible: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._uuids[entry] for entry in visible)


class _Ear:
    """What the kernel says during one attempt. `addresses` are the PCI addresses of the launch's GPUs by entry of
    CUDA_VISIBLE_DEVICES, once they are known."""

    def __init__(
        self, attempt: int, followed: Followed, clock: Callable[[], float], emit: Callable[[Event], None]
    ) -> None:
        self._attempt = attempt
        self._followed = followed
        self._clock = clock
        self._emit = emit
        self.addresses: dict[str, str] = {}
        self.ended = asyncio.Event()

    def hear(self) -> None:
        for text in self._followed.heard():
            if kernel.is_quoted(text):
                continue
            elsewhere = kernel.is_elsewhere(text, self.addresses.values())
            named = kernel.concerned(text, self.addresses)
            self._emit(KernelSaid(at=self._clock(), attempt=self._attempt, text=text, elsewhere=elsewhere, gpus=named))
        if self._followed.ended and not self.ended.is_set():
            self.ended.set()
            asyncio.get_running_loop().remove_reader(self._followed)  # what has ended is readable for ever

    def hear_all(self) -> None:
        """What has been said by now; of a flood, a part."""
        for _ in range(LAST_READINGS):
            self.hear()
            if not self._followed.more:
                return


async def _opened(follow: Callable[[], Followed]) -> Followed:
    """What `follow` opens in a thread; when nobody waits for it any more, it is closed. Raises Unanswered."""
    asked = asyncio.create_task(answered(follow, FOR_EVER_S))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(_close)
        raise


def _close(asked: asyncio.Task[Followed]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


class _Look(Generic[T]):
    """One question to the kernel at a time. Should it never answer, the daemon is told of it, goes on, and can end: an engine
    of which nothing is seen gets no more start time from systemd, and is judged by nobody."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._asked: asyncio.Task[T] | None = None

    async def answer(self) -> T | None:
        """The answer, None where there is none yet. Raises what the work raises."""
        new = self._asked is None
        asked = self._asked = self._asked or asyncio.create_task(answered(self._work, FOR_EVER_S))
        done, _ = await asyncio.wait({asked}, timeout=LOOK_WITHIN_S)
        if not done:
            if new:
                log.warning("processes.unobserved", why=f"the kernel has not answered for {LOOK_WITHIN_S:g} s")
            return None
        self._asked = None
        try:
            return asked.result()
        except TimeoutError:
            log.warning("processes.unobserved", why="no thread can be started; raise the limit of processes (TasksMax)")
            return None

    def leave(self) -> None:
        """Wait for no answer any more."""
        if self._asked is not None:
            self._asked.cancel()


def _pace_s(loading: Callable[[], bool]) -> float:
    return LOADING_EVERY_S if loading() else SERVING_EVERY_S


def _sample(reading: GpuReading) -> GpuSample:
    return GpuSample(
        uuid=reading.uuid,
        used_bytes=reading.memory_used_bytes,
        total_bytes=reading.memory_total_bytes,
        utilisation_percent=reading.utilisation_percent,
        power_mw=reading.power_mw,
        processes=reading.processes,
    )
