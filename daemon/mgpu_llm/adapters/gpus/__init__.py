"""The host's GPUs as the NVIDIA driver tells them through NVML (nvidia-ml-py), without ever waiting on the driver.

A driver call may never return: NVML then sits in the kernel and nothing can take it back. So all calls run in one
daemon thread; a caller waits for it up to a deadline and then goes on. Nothing is queued behind a call that is overdue.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.gpus import bus
from mgpu_llm.adapters.gpus.details import Details
from mgpu_llm.adapters.gpus.driver_thread import DriverThread
from mgpu_llm.adapters.gpus.naming import resolve
from mgpu_llm.adapters.gpus.nvml import Nvml
from mgpu_llm.adapters.gpus.session import Session
from mgpu_llm.adapters.gpus.told import (
    Gpu,
    GpuDetails,
    GpuHealth,
    GpuPair,
    GpuProcess,
    GpuReading,
    GpusUnobserved,
    HostGpus,
    MigSlice,
)

__all__ = (
    "Gpu",
    "GpuDetails",
    "GpuHealth",
    "GpuPair",
    "GpuProcess",
    "GpuReading",
    "Gpus",
    "GpusUnobserved",
    "HostGpus",
    "MigSlice",
    "resolve",
)

#: Of many questions in a row each gets at least this long, however late it is.
LEAST_S: Final = 1.0


class Gpus:
    """The GPUs of this host. Make it once and keep it: it holds one thread and one NVML session, both for good.

    The driver, or its library, may come up after us, go, and come back: every failed call starts afresh at the next.
    """

    def __init__(self, devices: Path = bus.DEVICES) -> None:
        """`devices` is where the kernel lists the GPUs that the driver holds."""
        self._driver = DriverThread()
        session = Session()
        self._nvml = Nvml(session, devices)
        self._details = Details(session, devices)

    async def inventory(self, deadline_s: float = 10) -> tuple[Gpu, ...]:
        """All GPUs by index, from 0 without a gap. The first call wakes the GPUs, which can take seconds. A lost GPU is an entry
        that says so, and the others keep their indices (NVML counts it in nvmlDeviceGetCount, and refuses its handle).

        Raises GpusUnobserved where the driver is silent or missing, or does not let this user ask a GPU.
        """
        return await self._driver.call(self._nvml.inventory, deadline_s)

    async def read(
        self, uuids: Sequence[str], deadline_s: float = 2, *, processes: bool = True
    ) -> tuple[GpuReading, ...]:
        """One reading for each of `uuids` (whole UUIDs, as inventory gives them), in their order; all or nothing. Without
        `processes` nobody asks who computes there, which is the dearest question.

        Raises GpusUnobserved.
        """
        wanted = tuple(uuids)
        return await self._driver.call(lambda: self._nvml.read(wanted, processes), deadline_s)

    async def nvlinked(self, uuids: Sequence[str], deadline_s: float = 2) -> frozenset[frozenset[str]]:
        """Which two of `uuids` (whole UUIDs) reach each other over NVLink, directly or through NVSwitch: each pair is a set
        of two UUIDs, and the order and repetition of `uuids` mean nothing. All or nothing: a pair that is not in the
        answer has no NVLink, as the driver says; it is what vLLM asks (platforms/cuda.py, is_fully_connected, 0.32.0).

        Raises GpusUnobserved, also where the driver does not tell of one pair: that is not the same as no NVLink.
        """
        wanted = tuple(dict.fromkeys(uuids))
        return await self._driver.call(lambda: self._nvml.nvlinked(wanted), deadline_s)

    async def addresses(self, uuids: Sequence[str], deadline_s: float = 2) -> tuple[str, ...]:
        """The PCI addresses of `uuids` (whole UUIDs), in their order, as "00000000:17:00.0". Raises GpusUnobserved, also where
        the driver does not tell."""
        wanted = tuple(uuids)
        return await self._driver.call(lambda: self._nvml.addresses(wanted), deadline_s)

    async def health(self, uuids: Sequence[str], deadline_s: float = 2) -> tuple[GpuHealth, ...]:
        """Whether each of `uuids` (whole UUIDs) can be used at all, in their order. A lost GPU is an entry that says so; one
        that is lost says so until NVML, started afresh for each call after an error, finds that it is back.

        Raises GpusUnobserved where the driver is silent or missing.
        """
        wanted = tuple(uuids)
        return await self._driver.call(lambda: self._nvml.health(wanted), deadline_s)

    async def versions(self, deadline_s: float = 2) -> dict[str, str]:
        """The driver's version, and the CUDA version that it supports, as far as it tells. Raises GpusUnobserved."""
        return await self._driver.call(self._nvml.versions, deadline_s)

    async def details(self, deadline_s: float = 4) -> HostGpus:
        """All that there is to tell: some dozen questions for each GPU, and four for each two that can be asked. A lost GPU
        is an entry that says so, and what a GPU does not tell is None. Each GPU is a call of its own, so that `read` need
        not wait for all of them; what joins the last ones is left out where the deadline comes first.

        Raises GpusUnobserved where the driver is silent or missing, or too slow for the GPUs alone.
        """
        clock = asyncio.get_running_loop().time
        ends_at = clock() + deadline_s
        count, versions = await self._driver.call(self._details.versions, max(deadline_s, LEAST_S))
        gpus, pairs = list[GpuDetails](), list[GpuPair]()
        for index in range(count):
            if clock() > ends_at:
                raise GpusUnobserved(f"the NVIDIA driver has told of {index} of {count} GPUs in {deadline_s:g} s")
            gpu = partial(self._details.gpu, index, count)
            gpus.append(await self._driver.call(gpu, max(ends_at - clock(), LEAST_S)))
        there = [gpu.index for gpu in gpus if not gpu.lost and not gpu.untold]
        for at, index in enumerate(there):
            if clock() > ends_at:
                break  # what joins the others is not told
            joined = partial(self._details.pairs, index, there[at + 1 :])
            pairs += await self._driver.call(joined, max(ends_at - clock(), LEAST_S))
        return HostGpus(**versions, gpus=tuple(gpus), pairs=tuple(pairs))
