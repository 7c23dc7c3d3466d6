"""What lives on the host while the hardware bench runs: processes with its mark, GPU memory, files in /dev/shm.

A thread looks all the time: once a second, and twenty times a second from a verdict of the daemon on, so that the seconds from
the engine's SIGKILL to clean GPUs can be told without asking the daemon.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine import tags
from mgpu_llm.adapters.engine.tree import read_stat
from mgpu_llm.adapters.gpus import Gpu, Gpus, GpusUnobserved

SHM: Final = Path("/dev/shm")
#: Whatever the bench starts has this in its environment, with the bench's own pid.
MARK: Final = "MGPU_HARDWARE_BENCH"
#: GPUs that hold no more than this beyond what they held before count as clean; a CUDA context has more.
CLEAN_WITHIN_BYTES: Final = 256 << 20
IDLE_S: Final = 20.0
SETTLED_S: Final = 2.0
LOOK_S: Final = 1.0
CLOSE_LOOK_S: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look: monotonic seconds, the living processes of the engine, and the bytes that each GPU holds more than before
    (empty: no GPUs, or the driver did not answer)."""

    at: float
    pids: frozenset[int]
    held: tuple[int, ...] = ()


def clean_after(looks: Sequence[Look], verdict_at: float, watching_gpus: bool) -> float | None:
    """Seconds from an engine's SIGKILL after a verdict until no process of it lives and the GPUs are as before, None where
    that was never seen. At its longest: it counts from the last look at which all of them still lived."""
    before = [look for look in looks if look.at <= verdict_at]
    engine = before[-1].pids if before else frozenset[int]()
    after = [look for look in looks if look.at > verdict_at]
    killed_at = verdict_at
    for look in after:
        if not engine <= look.pids:
            break
        killed_at = look.at
    for look in after:
        gpus_clean = not watching_gpus or (look.held and max(look.held) <= CLEAN_WITHIN_BYTES)
        if look.at > killed_at and not engine & look.pids and gpus_clean:
            return look.at - killed_at
    return None


@dataclass
class Watch:
    """The looks of one life. `tag` is what the mark of an engine's processes begins with (`adapters.engine.tags`)."""

    tag: str
    cards: tuple[Gpu, ...]
    before: tuple[int, ...]
    looks: list[Look] = field(default_factory=list)
    close: threading.Event = field(default_factory=threading.Event)
    _end: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Look in a thread until the block is left."""
        thread = threading.Thread(target=lambda: asyncio.run(self._look_on()), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join(10)

    def engine(self) -> frozenset[int]:
        """The engine's living processes, found anew."""
        return _living(tags.find(self.tag))

    async def _look_on(self) -> None:
        gpus, known = Gpus(), frozenset[int]()
        looked_at = -LOOK_S
        while not self._end.is_set():
            close = self.close.is_set()
            if close or time.monotonic() - looked_at >= LOOK_S:
                # A process that dies has no environment any more and still holds its GPU: once known it is followed.
                known = _living(known if close else known | tags.find(self.tag))
                held = await held_beyond(gpus, self.cards, self.before)
                looked_at = time.monotonic()
                self.looks.append(Look(at=looked_at, pids=known, held=held))
            await asyncio.sleep(CLOSE_LOOK_S)


def _living(pids: Iterable[int]) -> frozenset[int]:
    return frozenset(pid for pid in pids if (stat := read_stat(pid)) is not None and stat.alive)


async def held_beyond(gpus: Gpus, cards: Sequence[Gpu], before: Sequence[int]) -> tuple[int, ...]:
    """Bytes that each GPU holds more than `before`; empty where the driver does not answer."""
    if not cards:
        return ()
    try:
        readings = await gpus.read([card.uuid for card in cards], 2, processes=False)
    except GpusUnobserved:
        return ()
    return tuple(now.memory_used_bytes - then for now, then in zip(readings, before, strict=True))


def held_now(cards: Sequence[Gpu]) -> tuple[int, ...]:
    """Bytes in use on each GPU. Raises RuntimeError where the driver does not tell."""
    held = asyncio.run(held_beyond(Gpus(), cards, [0] * len(cards)))
    if len(held) != len(cards):
        raise RuntimeError("cannot read the GPUs' memory: the driver does not answer")
    return held


def in_shared_memory() -> frozenset[str]:
    """The names in /dev/shm."""
    return frozenset(entry.name for entry in SHM.iterdir())


def marked() -> dict[int, str]:
    """Every living process that this bench has started and that still lives, by pid, with its name."""
    entry, found = f"\0{MARK}={os.getpid()}\0".encode(), dict[int, str]()
    for pid in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()):
        with suppress(OSError):
            if entry in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() and pid != os.getpid():
                stat = read_stat(pid)
                if stat is not None and stat.alive:
                    found[pid] = stat.name
    return found


def used_by_others(names: frozenset[str], ours: Container[int]) -> frozenset[str]:
    """Which of these files in /dev/shm some process has mapped that is not `ours`: on a host that others use they are not left
    behind but somebody's."""
    used = set[str]()
    for pid in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()) if names else ():
        with suppress(OSError):
            mapped = Path(f"/proc/{pid}/maps").read_bytes().decode("utf-8", "replace") if pid not in ours else ""
            used |= {name for name in names if f"{SHM}/{name}\n" in mapped}
    return frozenset(used)


def leftovers(cards: Sequence[Gpu], before: Sequence[int], shared: frozenset[str]) -> dict[str, object]:
    """What a life has left: {"processes": [str], "gpu_bytes": [int], "gpu_unread": bool, "shm": [str], "gpus_clean_s": float
    or None}. What is left of processes is ended once it has been counted, and the GPUs are waited for."""
    found, gpus, began = marked(), Gpus(), time.monotonic()
    held = at_once = asyncio.run(held_beyond(gpus, cards, before))
    for pid in found:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    while cards and (not held or max(held) > CLEAN_WITHIN_BYTES) and time.monotonic() - began < IDLE_S:
        time.sleep(0.2)
        held = asyncio.run(held_beyond(gpus, cards, before))
    clean = not cards or (bool(held) and max(held) <= CLEAN_WITHIN_BYTES)
    clean_s = round(time.monotonic() - began, 2) if clean else None
    if new := in_shared_memory() - shared:
        # What its maker is about to remove is not left behind, and on a host with others there is always some of that.
        time.sleep(SETTLED_S)
        new &= in_shared_memory()
    return {
        "processes": [f"{pid} {name}" for pid, name in found.items()],
        "gpu_bytes": [max(0, extra) for extra in at_once],
        "gpu_unread": bool(cards) and not at_once,
        "shm": sorted(new - used_by_others(new, found)),
        "gpus_clean_s": clean_s,
    }
