"""What the GPUs held before an attempt, who holds more after it, and which of them must not be used any more."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import structlog

from mgpu_llm.adapters.engine import leftovers
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.tree import read_stat
from mgpu_llm.adapters.gpus import GpuReading, Gpus
from mgpu_llm.adapters.gpus import GpusUnobserved as DriverSilent
from mgpu_llm.adapters.gpus.owner import command_line, owner
from mgpu_llm.core import redaction
from mgpu_llm.core.events import EngineEvent, EngineGone, EngineSpawned, EngineStuck

#: A GPU counts as free again once it is within this of what it held before the attempt: contexts of others come and go.
FREE_WITHIN_BYTES: Final = 256 << 20
FREE_POLL_S: Final = 0.1
#: What others hold before an attempt is told from this on: less is a desktop, or a context that does nothing.
TAKEN_BYTES: Final = 1 << 30
#: Nothing runs on a GPU that is free. NVML's figure is an average of up to a second (nvml.h, nvmlUtilization_t): it fell below
#: this within 0.26 s of the SIGKILL of a kernel that span; its memory was back after 0.15 s (H100, driver 580.159, five times).
BUSY_PERCENT: Final = 95
#: What is held is looked at again after this, before its GPU is out.
AGAIN_S: Final = 0.5
#: /proc answers within milliseconds, unless a process is stuck.
LOOK_S: Final = 2.0
LONGEST_COMMAND: Final = 120
GIB: Final = 1 << 30

#: Of a process as EngineStuck names it.
_PID: Final = re.compile(r"^pid ([0-9]{1,10}) ")

log = structlog.get_logger()


class Baseline:
    """`uuids` maps the entries of CUDA_VISIBLE_DEVICES to NVML's UUIDs; `clock` gives monotonic seconds; `emit` takes what the
    engine's process tells, with the GPUs that are out added to it."""

    def __init__(
        self, gpus: Gpus, uuids: Mapping[str, str], clock: Callable[[], float], emit: Callable[[EngineEvent], None]
    ) -> None:
        self._gpus = gpus
        self._uuids = uuids
        self._clock = clock
        self._emit = emit
        self._visible: dict[str, str] = {}
        self._before: dict[str, GpuReading] = {}
        self._out: dict[str, str] = {}
        self._holders: dict[str, str] = {}
        self._taken: tuple[str, ...] = ()
        self._told: tuple[str, ...] = ()
        self._asking: asyncio.Task[None] | None = None

    async def remember(self, visible: Sequence[str]) -> None:
        """Note what the GPUs hold before the engine touches them, and say who holds much of it."""
        self._visible = {self._uuids[entry]: entry for entry in visible}
        self._before, self._out, self._holders, self._taken = {}, {}, {}, ()
        try:
            readings = await self._gpus.read(tuple(self._visible))
        except DriverSilent:
            return
        self._before = {reading.uuid: reading for reading in readings}
        taken = [reading for reading in readings if reading.memory_used_bytes >= TAKEN_BYTES]
        self._holders = {reading.uuid: await _whose(reading) for reading in taken}
        self._taken = tuple(_told(reading, self._holders[reading.uuid]) for reading in taken)
        for what in self._taken if self._taken != self._told else ():
            log.warning("gpus.taken", what=what, consequence="the engine may find too little memory there")
        self._told = self._taken

    def lacking(self, needs_free: Mapping[str, float]) -> tuple[int, str] | None:
        """Of GPUs that need so much of their memory free, by entry, the one with the least where that is too little: how many
        stand before it, and what is said of it. None where there is room, or nobody knows."""
        seen = {self._visible[uuid]: reading for uuid, reading in self._before.items()}
        ranks = {rank: seen[entry] for rank, entry in enumerate(needs_free) if entry in seen}
        asked = tuple(needs_free.values())
        short = [rank for rank, reading in ranks.items() if _lacks(reading, asked[rank])]
        if not short:
            return None
        rank = min(short, key=lambda rank: _free(ranks[rank]) / ranks[rank].memory_total_bytes)
        reading = ranks[rank]
        free, total = _free(reading) / GIB, reading.memory_total_bytes / GIB
        has = (
            f"GPU {reading.index} has {free:.2f} of {total:.2f} GiB free, and utilisation {asked[rank]:g} asks for more"
        )
        return rank, f"{has}: {self._holders[reading.uuid]}"

    async def wait_until_free(self, deadline_s: float) -> tuple[str, ...]:
        """Wait until the GPUs hold no more than when they were remembered, and nothing runs on those that nobody uses. Returns
        what living processes, or those of other containers, still hold after the deadline. A GPU that is not free although no
        process is left is told with the engine's end, as one that is out."""
        if not self._before:
            return ()
        give_up_at = self._clock() + deadline_s
        try:
            while held := await self._held(self._before):
                if self._clock() >= give_up_at:
                    return await self._judged(held)
                await asyncio.sleep(FREE_POLL_S)
        except DriverSilent as silence:
            return (f"cannot see whether the GPUs are free again: {silence.reason}",)
        return ()

    def tell(self, event: EngineEvent) -> None:
        """Hand on what the engine's process tells."""
        match event:
            case EngineSpawned() if self._taken:
                self._emit(replace(event, taken=self._taken))
            case EngineGone() if self._out:
                self._emit(replace(event, dirty=tuple(self._out.items())))
            case EngineStuck() if self._visible:
                self._asking = asyncio.get_running_loop().create_task(self._tell_stuck(event))
            case _:
                self._emit(event)

    async def _tell_stuck(self, event: EngineStuck) -> None:
        """With the GPUs that the stuck processes keep: all of the launch's where nobody can tell."""
        who = ", ".join(event.holders)
        stuck = {int(pid) for holder in event.holders for pid in _PID.findall(holder)}
        try:
            kept = {reading.uuid for reading in await self._held(self._before)} if self._before else set(self._visible)
            for reading in await self._gpus.read(tuple(self._before)):
                if not stuck.isdisjoint(dict(reading.processes or ())):
                    kept.add(reading.uuid)
        except DriverSilent:
            kept = set(self._visible)
        why = f"{who} cannot be ended: the kernel does not let it go"
        dirty = tuple((entry, why) for uuid, entry in self._visible.items() if uuid in kept)
        self._emit(replace(event, dirty=dirty))

    async def _held(self, before: Mapping[str, GpuReading]) -> tuple[GpuReading, ...]:
        """Those that are not as they were. Raises DriverSilent."""
        readings = await self._gpus.read(tuple(before), processes=False)
        changed = tuple(reading for reading in readings if _excess(reading, before) or _runs(reading, before))
        if not changed or any(_excess(reading, before) for reading in changed):
            return changed
        # What runs on them may be another's, who shares them.
        readings = await self._gpus.read(tuple(reading.uuid for reading in changed))
        return tuple([reading for reading in readings if _runs(reading, before) and not await _used(reading)])

    async def _judged(self, held: Sequence[GpuReading]) -> tuple[str, ...]:
        """What is still held: remarks on what living processes do; the rest is out. Raises DriverSilent.

        Twice, before one is out for good: who ends just now is no process any more, and what it held is not yet free.
        """
        remarks, out = await self._looked_at(held)
        if out:
            await asyncio.sleep(AGAIN_S)
            remarks, again = await self._looked_at(held)
            self._out = {entry: why for entry, why in again.items() if entry in out}
        return remarks

    async def _looked_at(self, held: Sequence[GpuReading]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Remarks, and what is held although nobody uses it. One that has become free meanwhile is neither."""
        remarks, out = list[str](), dict[str, str]()
        readings = await self._gpus.read(tuple(reading.uuid for reading in held))
        still = [reading for reading in readings if _excess(reading, self._before) or _runs(reading, self._before)]
        users = await self._users() if still else {}
        for reading in still:
            excess = _excess(reading, self._before)
            what = (
                f"GPU {reading.index} still holds {excess / 1e9:.2f} GB more than before the attempt"
                if excess
                else f"GPU {reading.index} is still at {reading.utilisation_percent} %"
            )
            used = replace(reading, processes=users.get(reading.uuid) or reading.processes)
            if await _used(used):
                remarks.append(f"{what}: {await _whose(used)}")
            else:
                out[self._visible[reading.uuid]] = f"{what} although no process is left that uses it"
        return tuple(remarks), out

    async def _users(self) -> dict[str, tuple[tuple[int, int | None], ...]]:
        """All who use a GPU, by UUID: a reading has only those that compute, and a desktop holds memory too."""
        told = await self._gpus.details()
        return {
            gpu.uuid: tuple((one.pid, one.used_bytes) for one in gpu.processes)
            for gpu in told.gpus
            if gpu.uuid is not None and gpu.processes is not None
        }


def _excess(reading: GpuReading, before: Mapping[str, GpuReading]) -> int:
    """Bytes more than before, 0 where it is about as much."""
    excess = reading.memory_used_bytes - before[reading.uuid].memory_used_bytes
    return excess if excess > FREE_WITHIN_BYTES else 0


def _free(reading: GpuReading) -> int:
    return reading.memory_total_bytes - reading.memory_used_bytes


def _lacks(reading: GpuReading, needed: float) -> bool:
    """Whether less than the fraction `needed` will be free for certain. What an older driver keeps for itself is in its figure,
    and the engine's own context is not: that is about as much."""
    held = reading.memory_used_bytes
    return held >= TAKEN_BYTES and held > (1 - needed) * reading.memory_total_bytes + FREE_WITHIN_BYTES


def _runs(reading: GpuReading, before: Mapping[str, GpuReading]) -> bool:
    busy = (reading.utilisation_percent or 0) >= BUSY_PERCENT
    return busy and (before[reading.uuid].utilisation_percent or 0) < BUSY_PERCENT


async def _used(reading: GpuReading) -> bool:
    """Whether a living process uses the GPU, or may: in a container the driver shows no others, or as pids that mean nothing."""
    if reading.processes is None or not leftovers.all_pids_are_visible():
        return True
    return bool(await _living(reading))


async def _whose(reading: GpuReading) -> str:
    """Who holds a GPU, in words: each process that lives, with its bytes."""
    living = await _living(reading)
    told = [
        words if (held := dict(reading.processes or ()).get(pid)) is None else f"{words} holds {held / 1e9:.2f} GB"
        for pid, words in living.items()
    ]
    if told:
        return ", ".join(told)
    return "the driver names no process that can be seen here; it may be of a container"


async def _living(reading: GpuReading) -> dict[int, str]:
    pids = [pid for pid, _ in reading.processes or ()]
    found = await aside(lambda: {pid: _words(pid) for pid in pids if _lives(pid)}, LOOK_S)
    # Who cannot be looked at is there.
    return {pid: f"pid {pid}" for pid in pids} if found is None else found


def _lives(pid: int) -> bool:
    stat = read_stat(pid)
    if stat is not None:
        return stat.alive
    try:
        os.close(os.pidfd_open(pid))  # asks the kernel, where /proc is mounted with hidepid
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _words(pid: int) -> str:
    """As "pid 71 (user alice, python train.py)", without secrets and in one line."""
    whose = owner(pid)
    if whose is None:
        return f"pid {pid}"
    command = " ".join(redaction.argv(command_line(pid))) or whose.name
    command = "".join(letter if letter.isprintable() else " " for letter in command)
    return f"pid {pid} (user {whose.user}, {command[:LONGEST_COMMAND]})"


def _told(reading: GpuReading, whose: str) -> str:
    return f"GPU {reading.index} holds {reading.memory_used_bytes / 1e9:.2f} GB before the attempt: {whose}"
