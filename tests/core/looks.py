"""What looks at the engine's stacks find: in an engine that hangs, in one that works, and where nobody answers."""

from __future__ import annotations

from typing import Final

from mgpu_llm.core.events import Stack
from mgpu_llm.core.suspicion import APART_S

#: A quiet that is over its patience is looked at twice before it is called a stall.
CONFIRMED_S: Final = APART_S
#: Where a worker that waits for its peer stands.
WAITING: Final = ("synchronize (torch/cuda/streams.py:105)", "__init__ (device_communicators/pynccl.py:143)")


def stack(pid: int = 1027, *frames: str, **changes: object) -> Stack:
    """Where the main thread of a process stands: in WAITING unless `frames` say where."""
    fields = {"thread": pid, "process": "VLLM::Worker_TP", "name": "MainThread", "state": "R"}
    return Stack(**{"pid": pid, "frames": frames or WAITING, **fields, **changes})  # type: ignore[arg-type]


def still(_: int) -> tuple[Stack, ...] | None:
    """Stacks of an engine that hangs: every look finds the same."""
    return (stack(),)


def working(look: int) -> tuple[Stack, ...] | None:
    """Stacks of an engine that works: no look finds what another found."""
    return (stack(1027, f"step_{look} (torch/_inductor/scheduler.py:{look})"),)


def unanswered(_: int) -> tuple[Stack, ...] | None:
    """Whoever takes the stacks is stuck itself."""
    return None
