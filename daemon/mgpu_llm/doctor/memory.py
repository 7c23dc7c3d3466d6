"""Memory of the host: what the ranks need besides the GPUs', shared memory, and who limits it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

from mgpu_llm.core.instances import USUAL
from mgpu_llm.doctor.finding import Finding, Subject, gib
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("memory")
#: Resident memory of a rank, and of the two processes above the ranks together, as vLLM 0.11 on two H200s had them at most while
#: it loaded and compiled: 4.0 and 2.0 GiB.
RANK_BYTES: Final = 4 << 30
ABOVE_BYTES: Final = 2 << 30
#: Files that are mapped and shared count in that, once for each process: with less it may do, with this part of it surely not.
LEAST_PART: Final = 0.25
#: vLLM's ring of messages to the ranks, and one for each that answers: 10 chunks of 24 MiB (distributed/device_communicators/
#: shm_broadcast.py, 0.32.0). NCCL's own segments come on top where peer-to-peer is off.
RING_BYTES: Final = 240 << 20
SHM: Final = "/dev/shm"  # noqa: S108 - the place itself is meant
#: What Docker gives a container without --shm-size.
DOCKERS_BYTES: Final = 64 << 20
#: Percent of the time in which every task waited for memory.
PRESSURE: Final = 10.0
_EMPTIER: Final = (
    "ls -lS /dev/shm | head shows what fills it: remove what nobody uses any more (sudo fuser /dev/shm/NAME)"
)
_BIGGER: Final = "sudo mount -o remount,size=50% /dev/shm; in a container: docker run --ipc=host, or --shm-size=16g"


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name, from /proc/meminfo."""
    lines = (re.fullmatch(r"(\S+):\s+(\d+) kB", line) for line in text.splitlines())
    return {found[1]: int(found[2]) << 10 for found in lines if found}


def pressure(text: str) -> float | None:
    """Percent of the last ten seconds in which all tasks waited, from /proc/pressure/memory."""
    found = re.search(r"^full avg10=([\d.]+)", text, re.MULTILINE)
    return float(found[1]) if found else None


def check(
    system: System, *, ranks: int, weights: int | None, limit: int | None, unit: str = USUAL
) -> Iterator[Finding]:
    """`weights` are the bytes of the model's files, None where nobody knows. `limit` is that of the engine's control
    group, and `unit` is how systemctl calls what it belongs to."""
    told = meminfo(system.text("/proc/meminfo"))
    if "MemAvailable" in told:
        yield from _free(told, ranks, weights)
    else:
        yield SUBJECT.unknown("memory-free", "no /proc/meminfo")
    yield _limit(limit, ranks, weights, f"sudo systemctl set-property {unit} MemoryMax=infinity")
    if (waits := pressure(system.text("/proc/pressure/memory"))) is None:
        yield SUBJECT.unknown("memory-pressure", "this kernel does not tell (psi=1 on its command line)")
    elif waits >= PRESSURE:
        seen = f"everything waits for memory {waits:g} % of the time: the host thrashes, and a load would crawl"
        yield SUBJECT.warning("memory-pressure", seen, "end what takes the memory: ps aux --sort=-rss | head")
    else:
        yield SUBJECT.ok("memory-pressure", f"tasks wait for memory {waits:g} % of the time")
    if system.text("/proc/sys/vm/overcommit_memory").strip() == "2":
        seen = "vm.overcommit_memory is 2: CUDA reserves more addresses than there is memory, and may be refused"
        yield SUBJECT.warning("memory-overcommit", seen, "sudo sysctl vm.overcommit_memory=0")


def shared(system: System, ranks: int) -> Iterator[Finding]:
    """The folder through which the processes of an engine talk."""
    try:
        disk = os.statvfs(system.path(SHM))
    except OSError as error:
        why = (error.strerror or "").lower()
        yield SUBJECT.problem("memory-shm", f"cannot use {SHM}: {why}", f"sudo mount -t tmpfs tmpfs {SHM}")
        return
    yield shm(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, ranks)


def shm(total: int, free: int, ranks: int) -> Finding:
    """Of the sizes in bytes."""
    wanted = RING_BYTES * (1 + ranks)
    seen = f"{SHM}: {gib(free)} free of {gib(total)}"
    if ranks < 2 or free >= wanted:
        return SUBJECT.ok("memory-shm", seen)
    seen = f"{seen}; {ranks} ranks map up to {gib(wanted)} for vLLM's messages, and NCCL more where peer-to-peer is off"
    cure = _EMPTIER if total >= 2 * wanted else _BIGGER
    if free <= DOCKERS_BYTES:
        return SUBJECT.problem("memory-shm", seen, cure)
    return SUBJECT.warning("memory-shm", seen, cure)


def group_limit(system: System) -> int | None:
    """Bytes that the control groups which we are in may have; None for no limit."""
    return system.group_limit("memory", "memory.max", "memory.limit_in_bytes")


def _free(told: dict[str, int], ranks: int, weights: int | None) -> Iterator[Finding]:
    available, needed = told["MemAvailable"], ABOVE_BYTES + ranks * RANK_BYTES
    swap = told.get("SwapFree", 0)
    spare = f"{gib(swap)} of swap free" if swap else "no swap"
    seen = f"{gib(available)} of {gib(told.get('MemTotal', 0))} available, {spare}"
    if available < needed:
        short = f"{seen}; {ranks} ranks take up to {gib(needed)} while they load"
        said = SUBJECT.problem if available + swap < LEAST_PART * needed else SUBJECT.warning
        yield said("memory-free", short, "end what takes the memory: ps aux --sort=-rss | head; or use fewer GPUs")
    elif weights is not None and available < weights + needed:
        slow = (
            f"{seen}: the model's {gib(weights)} do not stay in the page cache, and every rank reads them from the disk"
        )
        yield SUBJECT.warning("memory-free", slow, "free memory, or expect the load to take as long as the disk needs")
    else:
        yield SUBJECT.ok("memory-free", seen)


def _limit(limit: int | None, ranks: int, weights: int | None, lifted: str) -> Finding:
    needed = ABOVE_BYTES + ranks * RANK_BYTES
    if limit is None:
        return SUBJECT.ok("memory-limit", "no memory limit on the engine's control group")
    seen = f"the engine's control group may use {gib(limit)}"
    if limit < needed:
        seen = f"{seen}, and {ranks} ranks take up to {gib(needed)} while they load: the kernel may kill one"
        cure = f"{lifted}, or docker run without --memory"
        said = SUBJECT.problem if limit < LEAST_PART * needed else SUBJECT.warning
        return said("memory-limit", seen, cure)
    if weights is not None and limit < weights:
        seen = f"{seen}, less than the model's {gib(weights)}, which its page cache counts against"
        return SUBJECT.warning("memory-limit", seen, lifted)
    return SUBJECT.ok("memory-limit", seen)
