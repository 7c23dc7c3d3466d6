"""Everything that NVML tells of a GPU and of what joins two. All of it blocks, in the driver's thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.gpus import bus, recovery
from mgpu_llm.adapters.gpus.session import Questions, Session, if_told, memory
from mgpu_llm.adapters.gpus.slices import slices
from mgpu_llm.adapters.gpus.told import GpuDetails, GpuPair, GpuProcess

#: nvml.h, nvmlComputeMode_t; 1, exclusive to a thread, is no longer supported.
_COMPUTE_MODES: Final = {0: "default", 1: "exclusive-thread", 2: "prohibited", 3: "exclusive-process"}
#: nvml.h, nvmlGpuTopologyLevel_t.
_PATHS: Final = {0: "internal", 10: "single", 20: "multiple", 30: "hostbridge", 40: "node", 50: "system"}
#: nvml.h, nvmlGpuP2PStatus_t; 6 is unknown.
_P2P: Final = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by the driver's settings",
    5: "not supported",
}
#: nvml.h, NVML_P2P_CAPS_INDEX_READ, which pynvml has as a tuple (13.615.71).
_READ: Final = 0


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a GPU said of itself while it still did."""

    uuid: str | None = None
    name: str | None = None
    pci: str | None = None


class Details:
    """The questions that take their time. Only the driver's thread may touch it; `devices` is where the kernel lists what the
    driver holds."""

    def __init__(self, session: Session, devices: Path) -> None:
        self._session = session
        self._devices = devices
        self._known: dict[int, _Known] = {}

    def versions(self) -> tuple[int, dict[str, str | None]]:
        """How many GPUs there are, and the versions of "driver", "cuda" and "nvml"."""
        with self._session.open("list the GPUs") as nvml:
            count = int(nvml.nvmlDeviceGetCount())
            cuda = if_told(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
            return count, {
                "driver": if_told(nvml, nvml.nvmlSystemGetDriverVersion),
                "cuda": None if not cuda else f"{cuda // 1000}.{cuda % 1000 // 10}",
                "nvml": if_told(nvml, nvml.nvmlSystemGetNVMLVersion),
            }

    def gpu(self, index: int, count: int) -> GpuDetails:
        """GPU `index` of `count`."""
        with self._session.open(f"look at GPU {index}") as nvml:
            gpu = Questions(nvml, self._session)
            handle = gpu.told(partial(nvml.nvmlDeviceGetHandleByIndex, index), searched=True)
            if handle is None:
                known = self._known.get(index, _Known())
                pci = known.pci or bus.address(index, count, self._devices)
                untold = "" if gpu.lost else "the driver does not let this user ask it"
                return GpuDetails(index=index, uuid=known.uuid, name=known.name, pci=pci, lost=gpu.lost, untold=untold)
            known = self._identify(nvml, gpu, index, handle)
            told = {**_state(nvml, gpu, handle), **_settings(nvml, gpu, handle)}
            return GpuDetails(index=index, **asdict(known), **told, lost=gpu.lost)

    def pairs(self, index: int, others: Collection[int]) -> tuple[GpuPair, ...]:
        """What joins GPU `index` with each of `others`. Pairs of which nothing is told are among them."""
        with self._session.open(f"ask what joins GPU {index} to others") as nvml:
            return tuple(self._pair(nvml, index, other) for other in others)

    def _identify(self, nvml: Any, gpu: Questions, index: int, handle: object) -> _Known:
        """First of all: what is lost later is known by it, now and whenever it is asked again."""
        pci = gpu.told(lambda: str(nvml.nvmlDeviceGetPciInfo(handle).busId))
        uuid = gpu.told(lambda: str(nvml.nvmlDeviceGetUUID(handle)))
        name = gpu.told(lambda: str(nvml.nvmlDeviceGetName(handle)))
        before = self._known.get(index, _Known()) if gpu.lost else _Known()
        known = _Known(uuid=uuid or before.uuid, name=name or before.name, pci=pci or before.pci)
        self._known[index] = known
        return known

    def _pair(self, nvml: Any, one: int, other: int) -> GpuPair:
        gpu = Questions(nvml, self._session)
        handles = [gpu.told(partial(nvml.nvmlDeviceGetHandleByIndex, index), searched=True) for index in (one, other)]
        if None in handles:
            return GpuPair(one=one, other=other)

        def reach(kind: int) -> str | None:
            status = gpu.told(lambda: int(nvml.nvmlDeviceGetP2PStatus(*handles, kind)))
            return None if status is None else _P2P.get(status)

        path = gpu.told(lambda: int(nvml.nvmlDeviceGetTopologyCommonAncestor(*handles)))
        nvlink = reach(nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        return GpuPair(
            one=one,
            other=other,
            path=None if path is None else _PATHS.get(path, f"unknown-{path}"),
            nvlink=None if nvlink is None else nvlink == _P2P[0],
            p2p_read=reach(_READ),
            p2p_write=reach(nvml.NVML_P2P_CAPS_INDEX_WRITE),
        )


def _state(nvml: Any, gpu: Questions, handle: object) -> dict[str, Any]:
    """What changes from one moment to the next."""
    ask = _asking(gpu, handle)
    held = gpu.told(lambda: memory(nvml, handle))
    utilisation = ask(nvml.nvmlDeviceGetUtilizationRates)
    return {
        "memory_total_bytes": getattr(held, "total", None),
        "memory_used_bytes": getattr(held, "used", None),
        "memory_free_bytes": getattr(held, "free", None),
        "memory_reserved_bytes": getattr(held, "reserved", None),  # the older call has no such figure
        "utilisation_percent": getattr(utilisation, "gpu", None),
        "power_mw": ask(nvml.nvmlDeviceGetPowerUsage),
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "recovery_action": gpu.told(lambda: recovery.action(nvml, handle)),
        "processes": _processes(nvml, gpu, handle),
    }


def _settings(nvml: Any, gpu: Questions, handle: object) -> dict[str, Any]:
    """What it is set to, and what follows from that."""
    ask = _asking(gpu, handle)
    ecc, mig = ask(nvml.nvmlDeviceGetEccMode), ask(nvml.nvmlDeviceGetMigMode)
    mode, persistence = ask(nvml.nvmlDeviceGetComputeMode), ask(nvml.nvmlDeviceGetPersistenceMode)
    return {
        "power_limit_mw": ask(nvml.nvmlDeviceGetEnforcedPowerLimit),
        "ecc": None if ecc is None else bool(ecc[0]),
        "ecc_uncorrected": _ecc_errors(nvml, gpu, handle) if ecc and ecc[0] else None,
        "mig": None if mig is None else bool(mig[0]),
        "mig_slices": None if mig is None else slices(nvml, gpu.told, handle),
        "compute_mode": None if mode is None else _COMPUTE_MODES.get(mode, f"unknown-{mode}"),
        "persistence": None if persistence is None else bool(persistence),
    }


def _asking(gpu: Questions, handle: object) -> Callable[..., Any]:
    return lambda call, *more: gpu.told(partial(call, handle, *more))


def _ecc_errors(nvml: Any, gpu: Questions, handle: object) -> int | None:
    """Since the driver was loaded: those of earlier lives are mended, or the GPU would be out of service."""
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return gpu.told(lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, since)))


def _processes(nvml: Any, gpu: Questions, handle: object) -> tuple[GpuProcess, ...] | None:
    """Each once, also where it both computes and draws; None unless the GPU tells of those that compute."""
    computing = gpu.told(lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
    drawing = gpu.told(lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses_v3(handle))
    if computing is None:
        return None
    found: dict[tuple[int, int], GpuProcess] = {}
    for kind, listed in (("compute", computing), ("graphics", drawing or ())):
        for one in _distinct(listed):
            # The same process may hold something in several slices of a GPU.
            key = (one.pid, one.gpuInstanceId)
            both = "compute+graphics" if key in found else kind
            found[key] = GpuProcess(pid=one.pid, used_bytes=one.usedGpuMemory, kind=both)
    return tuple(found.values())


def _distinct(listed: Iterable[Any]) -> Iterable[Any]:
    return {(one.pid, one.gpuInstanceId): one for one in listed}.values()
