"""What is seen of a stall, held against the rules of the signatures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from mgpu_llm.core.events import Stack
from mgpu_llm.core.signatures import Gpus, Rule, Signature
from mgpu_llm.core.stall import SPINNING_PERCENT, Stalled

#: Up to this utilisation a GPU does nothing.
IDLE_PERCENT: Final = 5
#: What vLLM calls the processes that compute, in the 15 letters that the kernel keeps.
_WORKER: Final = re.compile(r"^VLLM::Worker|^VllmWorker")


def explain(stalled: Stalled, table: Iterable[Signature]) -> Signature:
    """The first row whose rule holds; the table ends with rows that hold in every stall of their phase."""
    return next(row for row in table if row.stall and row.holds_in(stalled.phase) and holds(row.stall, stalled))


def holds(rule: Rule, stalled: Stalled) -> bool:
    """Whether everything that the rule asks for was seen. What nobody could see does not hold."""
    return (
        (rule.gpus is None or _gpus(rule.gpus, stalled))
        and (rule.blind is None or rule.blind is not bool(_workers(stalled)))
        and (rule.spinning is None or rule.spinning is stalled.spinning)
        and (rule.gpu_memory_below_gb is None or _little_memory(rule.gpu_memory_below_gb, stalled))
        and (rule.frame is None or _any_frame(rule.frame, stalled))
        and (rule.workers is None or _every_worker(rule.workers, stalled))
        and (rule.waits_in is None or any(rule.waits_in.search(stack.waits_in) for stack in stalled.stacks))
        and (rule.last_line is None or rule.last_line.search(stalled.last_line) is not None)
        and (not rule.shows or bool(getattr(stalled, rule.shows)))
    )


def _gpus(wanted: Gpus, stalled: Stalled) -> bool:
    utilisation = [gpu.utilisation_percent for gpu in stalled.gpus]
    seen = [percent for percent in utilisation if percent is not None]
    if len(seen) < 2 or len(seen) < len(utilisation):
        return False
    return min(seen) >= SPINNING_PERCENT if wanted is Gpus.SPIN else max(seen) <= IDLE_PERCENT


def _little_memory(below_gb: float, stalled: Stalled) -> bool:
    return bool(stalled.gpus) and all(gpu.used_bytes < below_gb * 1e9 for gpu in stalled.gpus)


def _any_frame(pattern: re.Pattern[str], stalled: Stalled) -> bool:
    return any(pattern.search(frame) for stack in stalled.stacks for frame in stack.frames)


def _every_worker(pattern: re.Pattern[str], stalled: Stalled) -> bool:
    seen = _workers(stalled)
    return bool(seen) and all(any(pattern.search(frame) for frame in stack.frames) for stack in seen)


def _workers(stalled: Stalled) -> tuple[Stack, ...]:
    """The main threads of the workers whose Python frames were seen."""
    mains = (stack for stack in stalled.stacks if stack.thread == stack.pid and stack.frames)
    return tuple(stack for stack in mains if _WORKER.search(stack.process))
