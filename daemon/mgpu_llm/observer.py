"""Watch one engine from outside: its processes through /proc and its GPUs through NVML, at the pace of its state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

import structlog

from mgpu_llm.adapters.engine.aside import answered
from mgpu_llm.adapters.engine.pressure import Pressure
from mgpu_llm.adapters.gpus import GpuReading, Gpus
from mgpu_llm.adapters.gpus import GpusUnobserved as DriverSilent
from mgpu_llm.core.events import (
    Event,
    GpuSample,
    GpusSampled,
    GpusUnobserved,
    HostSampled,
    ProcessesSampled,
    ProcessSample,
)

#: Seconds between samples. While loading, the longest healthy quiet is about 2 s, so that a few samples fall into it, and
#: a look may take about 4 ms of processor time (tests/bench/sampler_cost.py), so that all looks are less than 1 % of a core.
LOADING_EVERY_S: Final = 0.5
SERVING_EVERY_S: Final = 5.0
#: Pressure is an average of ten seconds, made anew by the kernel every two.
HOST_EVERY_S: Final = 2.0
#: /proc answers within milliseconds. A process that is stuck in the kernel may hold the one lock that it needs.
LOOK_WITHIN_S: Final = 5.0
FOR_EVER_S: Final = 1e9
#: A GPU counts as free again once it is within this of what it held before the attempt: contexts of others come and go.
FREE_WITHIN_BYTES: Final = 256 << 20
FREE_POLL_S: Final = 0.1

T = TypeVar("T")

log = structlog.get_logger()


class Observer:
    """`uuids` maps the entries of CUDA_VISIBLE_DEVICES to NVML's UUIDs; `clock` gives monotonic seconds."""

    def __init__(
        self, gpus: Gpus, uuids: Mapping[str, str], clock: Callable[[], float], emit: Callable[[Event], None]
    ) -> None:
        self._gpus = gpus
        self._uuids = uuids
        self._clock = clock
        self._emit = emit
        self._baseline: dict[str, int] = {}

    async def remember(self, visible: Sequence[str]) -> None:
        """Note what the GPUs hold before the engine touches them."""
        self._baseline = {}
        try:
            readings = await self._gpus.read(self._named(visible), processes=False)
        except DriverSilent:
            return
        self._baseline = {reading.uuid: reading.memory_used_bytes for reading in readings}

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
            if visible:
                group.create_task(self._watch_gpus(attempt, self._named(visible), loading))

    async def wait_until_free(self, deadline_s: float) -> tuple[str, ...]:
        """Wait until the GPUs hold no more than when they were remembered. Returns what is still held after the deadline."""
        if not self._baseline:
            return ()
        give_up_at = self._clock() + deadline_s
        while True:
            try:
                readings = await self._gpus.read(tuple(self._baseline), processes=False)
            except DriverSilent as silence:
                return (f"cannot see whether the GPUs are free again: {silence.reason}",)
            held = {
                reading.uuid: (reading.index, excess)
                for reading in readings
                if (excess := reading.memory_used_bytes - self._baseline[reading.uuid]) > FREE_WITHIN_BYTES
            }
            if not held:
                return ()
            if self._clock() >= give_up_at:
                return tuple(
                    f"GPU {index} still holds {excess / 1e9:.2f} GB more than before the attempt; nvidia-smi names who"
                    for index, excess in held.values()
                )
            await asyncio.sleep(FREE_POLL_S)

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

    async def _watch_gpus(self, attempt: int, uuids: Sequence[str], loading: Callable[[], bool]) -> None:
        while True:
            try:
                readings = await self._gpus.read(uuids, processes=loading())
            except DriverSilent as silence:
                self._emit(GpusUnobserved(at=self._clock(), attempt=attempt, reason=silence.reason))
            else:
                self._emit(GpusSampled(at=self._clock(), attempt=attempt, gpus=tuple(map(_sample, readings))))
            await asyncio.sleep(_pace_s(loading))

    def _named(self, visible: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._uuids[entry] for entry in visible)


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
