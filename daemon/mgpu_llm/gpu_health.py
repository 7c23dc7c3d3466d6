"""Ask NVML, while an engine loads and serves, whether its GPUs can still be used, and tell when one has come not to be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from mgpu_llm.adapters.gpus import GpuHealth, GpusUnobserved
from mgpu_llm.core.events import Event, GpuUnfit
from mgpu_llm.core.xid import Action

#: An engine that hangs on a GPU that is gone answers nobody: each second counts. A look asks the driver two questions a GPU.
EVERY_S: Final = 2.0
#: What is told ends a service, so that it must be there a second time.
AGAIN_S: Final = 0.5
#: What NVML asks of the operator (adapters/gpus/recovery.ACTIONS). To drain peer-to-peer is to end what uses it; the domain of
#: GPUs of several hosts is nothing that one engine here must end for. What is not known is told, and ends nothing.
ACTIONS: Final[Mapping[str, Action]] = {
    "reset": Action.RESET,
    "reboot": Action.REBOOT,
    "drain-p2p": Action.RESET,
    "bus-reset": Action.RESET,
    "system-reboot": Action.REBOOT,
}


class HealthWatch:
    """Watches the GPUs of one attempt. `entries` maps NVML's UUIDs to entries of CUDA_VISIBLE_DEVICES; `ask` gives the health of
    UUIDs, in their order (Gpus.health); `clock` gives monotonic seconds."""

    def __init__(
        self,
        attempt: int,
        entries: Mapping[str, str],
        ask: Callable[[Sequence[str]], Awaitable[tuple[GpuHealth, ...]]],
        clock: Callable[[], float],
        emit: Callable[[Event], None],
    ) -> None:
        self._attempt = attempt
        self._entries = entries
        self._ask = ask
        self._clock = clock
        self._emit = emit
        self._told: dict[str, tuple[Action, str]] = {}
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        """Look now: something about the GPUs has changed."""
        self._hurried.set()

    async def run(self) -> None:
        """Ask until cancelled. A driver that is silent tells nothing of any GPU; that is told by who samples them."""
        while True:
            found = await self._found()
            if found.items() - self._told.items():
                await asyncio.sleep(AGAIN_S)
                again = await self._found()
                self._tell(dict(found.items() & again.items()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._hurried.wait()
            self._hurried.clear()

    async def _found(self) -> dict[str, tuple[Action, str]]:
        """What is wrong, by UUID."""
        try:
            answers = await self._ask(tuple(self._entries))
        except GpusUnobserved:
            return {}
        return {answer.uuid: wrong for answer in answers if (wrong := _wrong(answer)) is not None}

    def _tell(self, found: Mapping[str, tuple[Action, str]]) -> None:
        for uuid, (action, what) in found.items():
            if self._told.get(uuid) != (action, what):
                self._told[uuid] = (action, what)
                gpu = self._entries[uuid]
                self._emit(GpuUnfit(at=self._clock(), attempt=self._attempt, gpu=gpu, what=what, action=action))


def _wrong(health: GpuHealth) -> tuple[Action, str] | None:
    if health.lost:
        # NVML's code 16 says that only a reset is missing.
        return Action.RESET if "NVML error 16" in health.lost else Action.LOST, health.lost
    if health.recovery_action:
        action = ACTIONS.get(health.recovery_action, Action.DRAIN)
        return action, f"the driver asks for a recovery: {health.recovery_action}"
    return None
