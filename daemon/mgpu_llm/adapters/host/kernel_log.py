"""What the kernel has said in the last minutes that may explain a failure: of GPUs, IOMMU, memory, disks and stuck tasks."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host.program import Unanswered, ask

#: So far back. A GPU that fell off the bus, or an oom-kill, comes at most minutes before what it breaks.
LAST_S: Final = 900.0
MOST_LINES: Final = 1000
#: A kernel's buffer holds a few thousand records; one that is filled as we read must not hold us.
MOST_RECORDS: Final = 100_000
KMSG: Final = Path("/dev/kmsg")
MATTERS: Final = re.compile(
    r"NVRM|\bS?Xid\b|nvidia|IO_PAGE_FAULT|DMAR|AMD-Vi|iommu|oom-kill|oom_reaper|out of memory|killed process|hung_task"
    r"|blocked for more than|I/O error|EXT4-fs (?:error|warning)|XFS \(\S+\): .*(?:error|corrupt)|not responding"
    r"|nvme\S*: .*(?:timeout|abort|reset)|soft lockup|hard lockup|rcu\S* .*stall|segfault|general protection|traps:"
    r"|PCIe Bus Error|\bAER\b|\bmce:|machine check|hardware error",
    re.IGNORECASE,
)


def read() -> str:
    """Lines as "2026-11-24T21:05:00Z NVRM: Xid ...", oldest first, under a line that says whence they are.

    Raises Unanswered where nobody tells."""
    refused = list[str]()
    for name, source in SOURCES.items():
        try:
            lines = list(source())
        except Unanswered as silence:
            refused.append(str(silence))
            continue
        found = [line for line in lines if MATTERS.search(line)][-MOST_LINES:]
        head = f"# {name}: {len(found)} of the {len(lines)} lines of the last {LAST_S / 60:.0f} minutes matter"
        return "\n".join([head, *found]) + "\n"
    raise Unanswered("; ".join(refused))


def _kmsg() -> Iterable[str]:
    """The kernel's own buffer (Documentation/ABI/testing/dev-kmsg): "priority,number,microseconds,flags;text"."""
    try:
        descriptor = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise Unanswered(f"cannot open {KMSG}: {(error.strerror or '').lower()}") from None
    try:
        now_s = time.clock_gettime(time.CLOCK_MONOTONIC)
        booted = datetime.now(UTC) - timedelta(seconds=now_s)
        return [
            f"{booted + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ} {text}"
            for seconds, text in _records(descriptor)
            if seconds >= now_s - LAST_S
        ]
    finally:
        os.close(descriptor)


def _records(descriptor: int) -> Iterator[tuple[float, str]]:
    """When, in seconds since the boot, and what, up to the newest."""
    for _ in range(MOST_RECORDS):
        try:
            record = os.read(descriptor, 8192).decode("utf-8", "replace")
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.EPIPE:  # overwritten as we read: the next is the oldest that is left
                continue
            raise Unanswered(f"cannot read {KMSG}: {(error.strerror or '').lower()}") from None
        head, _, text = record.partition(";")
        fields = head.split(",")
        if len(fields) > 2 and fields[2].isdecimal():
            yield int(fields[2]) / 1e6, text.partition("\n")[0]


def _journal() -> Iterable[str]:
    argv = ["journalctl", "-k", "-q", "--no-pager", "-o", "short-iso", f"--since=-{LAST_S:.0f}s", "-n", "20000"]
    lines = ask(argv, limit_s=2.0).splitlines()
    if not lines:
        raise Unanswered("journalctl shows no line of the kernel to this user")
    return lines


def _dmesg() -> Iterable[str]:
    return ask(["dmesg", "--time-format", "iso"], limit_s=2.0).splitlines()


SOURCES: Final[dict[str, Callable[[], Iterable[str]]]] = {
    "/dev/kmsg": _kmsg,
    "journalctl -k": _journal,
    "dmesg": _dmesg,
}
