"""What the kernel says: whether it names a cause, and whether that can be about our engine.

The kernel speaks of the whole host. It may have killed somebody else's process, and a GPU of somebody else's may have failed:
neither explains what becomes of ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from mgpu_llm.core import diagnosis, xid
from mgpu_llm.core.diagnosis import Clue
from mgpu_llm.core.events import KernelSaid
from mgpu_llm.core.progress import Progress

#: Whom the kernel has killed for memory: "oom-kill:...,task=VLLM::Worker_TP,pid=71,uid=0" (Linux 5.0 and newer) and "Memory
#: cgroup out of memory: Killed process 71 (VLLM::Worker_TP)". Lines about GPUs have "pid=" too, and there nobody is killed.
_KILLED: Final = re.compile(r"oom-kill:.*\bpid=(?P<named>[0-9]{1,9})\b|[Kk]illed process (?P<told>[0-9]{1,9})\b")
#: "0000:17:00"; NVML gives the domain eight digits, and most add the function; the IOMMU's driver may leave out the domain.
_DEVICE: Final = re.compile(
    r"\b(?:(?P<domain>[0-9a-f]{4,8}):(?P<bus>[0-9a-f]{2}):(?P<device>[0-9a-f]{2})"
    r"|(?P<short_bus>[0-9a-f]{2}):(?P<short_device>[0-9a-f]{2})\.[0-7])\b",
    re.IGNORECASE,
)

#: What only the driver says, and how all its lines begin.
_DRIVERS_WORDS: Final = re.compile(r"NVRM:|\bSXid\b")
_BY_THE_DRIVER: Final = ("NVRM:", "nvidia-nvswitch")

Device = tuple[int | None, int, int]


def tells(text: str) -> bool:
    """Whether the line names a cause of a failure, whoever's."""
    return diagnosis.look_at_kernel(Clue(), text) != Clue()


def is_quoted(text: str) -> bool:
    """Whether the driver's words are in a line that is not the driver's. The kernel repeats names that any user may choose, of
    files ("overlayfs: failed to resolve '...'") and of cgroups: they must not end a service."""
    return _DRIVERS_WORDS.search(text) is not None and not text.startswith(_BY_THE_DRIVER)


def explains(said: KernelSaid, top_pid: int | None, heart: Progress) -> bool:
    """Whether the line can tell why our engine fails: the one whose first process is `top_pid`.

    What names none of our processes is none of ours. Processes are told apart by pid alone: another vLLM's are named as ours
    are. A daemon in a container that has pids of its own recognises none, and the exit status has to do.
    """
    if said.elsewhere or not tells(said.text):
        return False
    killed = _KILLED.search(said.text)
    return killed is None or int(killed["named"] or killed["told"]) in {top_pid, *heart.lately}


def is_elsewhere(text: str, gpus: Collection[str]) -> bool:
    """Whether the line is about PCI devices none of which is among `gpus`, the addresses of the GPUs in use. Where those are
    not known, nothing is; nor is what a switch between GPUs says, which has an address of its own."""
    ours = [device for gpu in gpus for device in _devices(gpu)]
    named = [] if xid.of_switch(text) else _devices(text)
    return bool(ours and named) and not any(_same(one, other) for one in named for other in ours)


def concerned(text: str, gpus: Mapping[str, str]) -> tuple[str, ...]:
    """Of which GPUs the line speaks: of `gpus`, addresses by entry of CUDA_VISIBLE_DEVICES, those entries."""
    named = _devices(text)
    return tuple(
        entry
        for entry, address in gpus.items()
        if any(_same(one, other) for one in named for other in _devices(address))
    )


def _devices(text: str) -> list[Device]:
    return [
        (int(found["domain"], 16), int(found["bus"], 16), int(found["device"], 16))
        if found["domain"]
        else (None, int(found["short_bus"], 16), int(found["short_device"], 16))
        for found in _DEVICE.finditer(text)
    ]


def _same(one: Device, other: Device) -> bool:
    return one[1:] == other[1:] and (one[0] == other[0] or None in (one[0], other[0]))
