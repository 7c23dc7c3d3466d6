"""What the engine's stacks say: whether two looks at them are the same, and what the threads wait for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from mgpu_llm.core.events import Stack, StacksTaken

#: Functions that wait by looking again and again: what lies further in changes while nobody works, and so may the line. vLLM's
#: busy loops are not among them: a worker compiles and captures graphs inside of its own (worker_busy_loop, 0.8.4 to 0.33.0),
#: and where it only waits, it stands in dequeue. Seen in hung engines (0.26.0, 0.32.0); tqdm's monitor wakes every 10 s.
_WAITING_LOOP: Final = re.compile(
    r"^(?:[\w.<>]+\.)?(?:acquire_read|acquire_write|wait_for_engine_startup|monitor_engine_liveness|_poll_until_acquired)"
    r" \(|^TMonitor\.run \("
)
#: Where a thread sleeps that waits for another; it may be caught on its way in or out.
_ASLEEP: Final = re.compile(r"^(?:[\w.<>]+\.)?(?:wait|poll|select|get|sched_yield|_recv|spin) \(")
#: Where a thread waits for its peers or its GPU although it runs: NCCL and CUDA spin (seen on two H200s and two H100s).
_WAITS: Final = re.compile(
    r"^(?:[\w.<>]+\.)?(?:synchronize|nccl\w+|all_reduce|all_gather\w*|reduce_scatter\w*|broadcast\w*|\w*barrier|send\w*|recv\w*"
    r"|init_process_group|rendezvous|new_group|dequeue|acquire\w*|wait\w*|poll|select|sched_yield) \("
)
#: Where a frozen cgroup holds its threads: version 1 and version 2.
_FROZEN: Final = frozenset({"__refrigerator", "do_freezer_trap"})
#: Frames of whoever waits for a lock file: filelock's acquire, and torch.utils.file_baton, with which extensions are built.
_LOCK_FILE: Final = re.compile(r"^\S+ \((?:\S*/)?(?:filelock/\S+|file_baton\.py(?::\d+)?)\)")
#: Frames of whoever reads the model's files.
_READING: Final = re.compile(r"safetensors|weight_utils|default_loader|get_tensor|load_weights|model_loader")
#: What the kernel waits in for a disk, a network file system or FUSE.
_STORAGE_WAIT: Final = re.compile(
    r"folio_wait|wait_on_page|io_schedule|blk_|bio_|nvme|nfs|rpc_wait|smb|cifs|fuse|request_wait_answer|ceph|lustre|^ll_|^cl_|p9_|gpfs|"
    r"xfs_|ext4_|btrfs|jbd2|filemap"
)
#: The same for a pipe or a socket in the place of a file: an ordinary wait, unless whoever waits reads the model.
_PIPE_WAIT: Final = re.compile(r"pipe|fifo|wait_for_partner|sk_wait|tcp_recv|unix_stream")
#: What vLLM calls the processes that compute, and those that lead them.
_COMPUTES: Final = re.compile(r"VLLM::|Vllm")
_HELPER: Final = re.compile(r"multiprocessing/resource_tracker\.py")
SHOWN_FRAMES: Final = 4
SHOWN_STACKS: Final = 12


def standing_still(first: StacksTaken, second: StacksTaken) -> bool | None:
    """Whether every thread seen in both looks stands where it stood; None where no thread's Python frames were seen in
    both, so that nothing can be said."""
    before, now = _by_thread(first.stacks), _by_thread(second.stacks)
    common = before.keys() & now.keys()
    return all(before[key] == now[key] for key in common) if common else None


def lock_waiters(stacks: Iterable[Stack]) -> tuple[Stack, ...]:
    """The threads that wait for a lock file."""
    return tuple(stack for stack in stacks if any(_LOCK_FILE.search(frame) for frame in stack.frames[:SHOWN_FRAMES]))


def storage_waiters(stacks: Iterable[Stack]) -> tuple[Stack, ...]:
    """The threads that wait in the kernel for storage."""
    return tuple(stack for stack in stacks if _waits_for_storage(stack))


def stopped(stacks: Iterable[Stack]) -> tuple[str, ...]:
    """The processes that somebody has stopped: by a signal, in a debugger, or with their cgroup."""
    held = (stack for stack in stacks if stack.state in ("T", "t") or stack.waits_in in _FROZEN)
    return tuple(dict.fromkeys(f"{stack.pid} ({stack.process})" for stack in held))


def running(before: Iterable[Stack], now: Iterable[Stack]) -> tuple[str, ...]:
    """The processes with a thread that runs in both looks in no function that is known to wait for a peer or a GPU: its Python
    stands still, but the native code below may work."""
    ran = {(stack.pid, stack.thread) for stack in before if stack.state == "R"}
    both = (stack for stack in now if stack.state == "R" and stack.frames and (stack.pid, stack.thread) in ran)
    busy = (stack for stack in both if not any(_WAITS.search(frame) for frame in stack.frames[: 2 * SHOWN_FRAMES]))
    return tuple(dict.fromkeys(f"{stack.pid} ({stack.process})" for stack in busy))


def shown(stacks: Iterable[Stack]) -> tuple[str, ...]:
    """Where each process stands, for people: one line for the main threads that stand in the same place, those that compute
    first. Python's own helper, which always waits, is left out."""
    mains = [stack for stack in stacks if stack.thread == stack.pid and not _HELPER.search(" ".join(stack.frames))]
    places = dict[str, list[Stack]]()
    for stack in sorted(mains, key=lambda stack: (not _COMPUTES.match(stack.process), stack.pid)):
        places.setdefault(_place(stack), []).append(stack)
    lines = [_line(place, there) for place, there in places.items()]
    return (*lines[:SHOWN_STACKS], *([f"and {len(lines) - SHOWN_STACKS} more"] if len(lines) > SHOWN_STACKS else []))


def _by_thread(stacks: Iterable[Stack]) -> dict[tuple[int, int], tuple[str, ...]]:
    return {(stack.pid, stack.thread): _without_waiting(stack.frames) for stack in stacks if stack.frames}


def _without_waiting(frames: tuple[str, ...]) -> tuple[str, ...]:
    """The frames without what changes while a thread only waits: from its outermost waiting loop outwards, that one by name
    alone, and without the functions in which it sleeps."""
    outermost = max((index for index, frame in enumerate(frames) if _WAITING_LOOP.match(frame)), default=-1)
    if outermost >= 0:
        return (frames[outermost].partition(" (")[0], *frames[outermost + 1 :])
    asleep = next((index for index, frame in enumerate(frames) if not _ASLEEP.match(frame)), len(frames))
    return frames[asleep:] or frames


def _waits_for_storage(stack: Stack) -> bool:
    if stack.waits_in in _FROZEN:
        return False
    if stack.state == "D" or _STORAGE_WAIT.search(stack.waits_in):
        return True
    reads = any(_READING.search(frame) for frame in stack.frames[: 2 * SHOWN_FRAMES])
    return reads and _PIPE_WAIT.search(stack.waits_in) is not None


def _place(stack: Stack) -> str:
    where = " < ".join(stack.frames[:SHOWN_FRAMES]) or "no Python frames"
    return f"{where}, in the kernel: {stack.waits_in}" if stack.waits_in else where


def _line(place: str, there: list[Stack]) -> str:
    names = dict[str, list[int]]()
    for stack in there:
        names.setdefault(stack.process, []).append(stack.pid)
    who = ", ".join(f"{name} ({', '.join(map(str, pids))})" for name, pids in names.items())
    return f"{who} {'stands' if len(there) == 1 else 'stand'} in {place}"
