"""NVML's calls and return codes. All of it blocks, in the driver's thread."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, TypeVar

from mgpu_llm.adapters.gpus import recovery
from mgpu_llm.adapters.gpus.told import Gpu, GpuHealth, GpuReading, GpusUnobserved

T = TypeVar("T")

# NVML's return codes (nvml.h, nvmlReturn_t). With these a call says that this driver or GPU does not tell: not
# supported, no permission, function not found, no data, argument version mismatch.
_NOT_TOLD = frozenset({3, 4, 13, 21, 25})
_CURES = {
    4: "; give this user access to /dev/nvidia*",
    9: '; load the driver ("modprobe nvidia")',
    12: "; install the NVIDIA driver (libnvidia-ml.so.1)",
    18: "; the driver was replaced while in use: reboot, or reload its modules and restart this service",
}


class Nvml:
    """The NVML session. Only the driver's thread may touch it: any line here can block, also the text of an error."""

    def __init__(self) -> None:
        self._initialised = False
        #: A GPU has failed in a call that has told the others all the same.
        self._stale = False
        #: By UUID, for as long as NVML stays initialised: its handle and index, which it looks up among all GPUs.
        self._handles: dict[str, tuple[Any, int]] = {}

    def inventory(self) -> tuple[Gpu, ...]:
        with self._session("list the GPUs") as nvml:
            count = nvml.nvmlDeviceGetCount()
        return tuple(self._identify(index) for index in range(count))

    def read(self, uuids: Sequence[str], with_processes: bool) -> tuple[GpuReading, ...]:
        return tuple(self._read(uuid, with_processes) for uuid in uuids)

    def nvlinked(self, uuids: Sequence[str]) -> frozenset[frozenset[str]]:
        # The driver answers the same for a pair in either order: it tells of the path, not of a direction.
        return frozenset(frozenset(pair) for pair in combinations(uuids, 2) if self._linked(*pair))

    def addresses(self, uuids: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._address(uuid) for uuid in uuids)

    def health(self, uuids: Sequence[str]) -> tuple[GpuHealth, ...]:
        with self._session("ask for the health of the GPUs") as nvml:
            return tuple(self._health(nvml, uuid) for uuid in uuids)

    def versions(self) -> dict[str, str]:
        with self._session("ask for the driver's version") as nvml:
            driver = _if_told(nvml, nvml.nvmlSystemGetDriverVersion)
            cuda = _if_told(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        told = {"driver": driver, "cuda": cuda and f"{cuda // 1000}.{cuda % 1000 // 10}"}
        return {what: str(version) for what, version in told.items() if version}

    def _identify(self, index: int) -> Gpu:
        with self._session(f"identify GPU {index}") as nvml:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            return Gpu(
                index=index,
                uuid=nvml.nvmlDeviceGetUUID(handle),
                name=nvml.nvmlDeviceGetName(handle),
                memory_total_bytes=_memory(nvml, handle).total,
            )

    def _read(self, uuid: str, with_processes: bool) -> GpuReading:
        with self._session(f'read GPU "{uuid}"') as nvml:
            handle, index = self._find(nvml, uuid)
            utilisation = _if_told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
            processes = None
            if with_processes:
                processes = _if_told(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
            memory = _memory(nvml, handle)
            return GpuReading(
                uuid=uuid,
                index=index,
                memory_used_bytes=memory.used,
                memory_total_bytes=memory.total,
                utilisation_percent=None if utilisation is None else utilisation.gpu,
                power_mw=_if_told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
                processes=None if processes is None else tuple((p.pid, p.usedGpuMemory) for p in processes),
            )

    def _linked(self, one: str, other: str) -> bool:
        doing = f'tell whether NVLink joins GPU "{one}" and GPU "{other}"'
        with self._session(doing) as nvml:
            handles = [self._find(nvml, uuid)[0] for uuid in (one, other)]
            status = _if_told(nvml, lambda: nvml.nvmlDeviceGetP2PStatus(*handles, nvml.NVML_P2P_CAPS_INDEX_NVLINK))
            if status is None or status == nvml.NVML_P2P_STATUS_UNKNOWN:
                raise GpusUnobserved(f"cannot {doing}: the driver does not say")
            return bool(status == nvml.NVML_P2P_STATUS_OK)

    def _address(self, uuid: str) -> str:
        with self._session(f'tell the PCI address of GPU "{uuid}"') as nvml:
            return str(nvml.nvmlDeviceGetPciInfo(self._find(nvml, uuid)[0]).busId)

    def _health(self, nvml: Any, uuid: str) -> GpuHealth:
        lost: list[str] = []

        def told(ask: Callable[[], T], *, searched: bool = False) -> T | None:
            try:
                return _if_told(nvml, ask)
            except nvml.NVMLError as error:
                self._stale = True
                lost.append(recovery.lost(error, searched=searched))
                return None

        found = told(lambda: self._find(nvml, uuid), searched=True)
        action = None
        if found is not None:
            # What only a GPU that works can answer; then what every driver answers that knows the question.
            told(lambda: _memory(nvml, found[0]))
            action = told(lambda: recovery.action(nvml, found[0]))
        asked_for = action if action is not None and action != recovery.ACTIONS[0] else ""
        return GpuHealth(uuid=uuid, lost=next(filter(None, lost), ""), recovery_action=asked_for)

    def _find(self, nvml: Any, uuid: str) -> tuple[Any, int]:
        if uuid not in self._handles:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._handles[uuid] = (handle, nvml.nvmlDeviceGetIndex(handle))
        return self._handles[uuid]

    @contextlib.contextmanager
    def _session(self, doing: str) -> Iterator[Any]:
        """NVML, initialised; after any error it is shut down, for a lost GPU stays lost to the session that lost it."""
        import pynvml as nvml  # here, for its size and because it is wanted in this thread alone

        try:
            if self._stale:
                self._end(nvml)
            if not self._initialised:
                nvml.nvmlInit()
                self._initialised = True
            yield nvml
        except nvml.NVMLError as error:
            reason = f"cannot {doing}: {error} (NVML error {error.value}){_CURES.get(error.value, '')}"
            if self._initialised:
                self._end(nvml)
            raise GpusUnobserved(reason) from error

    def _end(self, nvml: Any) -> None:
        self._initialised = self._stale = False
        self._handles = {}
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _memory(nvml: Any, handle: object) -> Any:
    """Memory with the driver's reserve apart from what is used, or both in one where the driver knows only that."""
    memory = _if_told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    return nvml.nvmlDeviceGetMemoryInfo(handle) if memory is None else memory


def _if_told(nvml: Any, ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except nvml.NVMLError as error:
        if error.value not in _NOT_TOLD:
            raise
        return None
