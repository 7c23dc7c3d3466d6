"""What the daemon asks NVML again and again: as few questions as will do. All of it blocks, in the driver's thread."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from mgpu_llm.adapters.gpus import bus, recovery
from mgpu_llm.adapters.gpus.session import Questions, Session, if_told, memory
from mgpu_llm.adapters.gpus.slices import slices
from mgpu_llm.adapters.gpus.told import Gpu, GpuHealth, GpuReading, GpusUnobserved


class Nvml:
    """The light questions. Only the driver's thread may touch it; `devices` is where the kernel lists what the driver holds."""

    def __init__(self, session: Session, devices: Path) -> None:
        self._session = session
        self._devices = devices
        self._lost_before = False

    def inventory(self) -> tuple[Gpu, ...]:
        if self._lost_before:
            # Only now: whoever asks for the others meanwhile need not wait until all GPUs are awake again.
            self._session.spoil()
        with self._session.open("list the GPUs") as nvml:
            count = int(nvml.nvmlDeviceGetCount())
        found = tuple(self._identify(index, count) for index in range(count))
        self._lost_before = any(gpu.lost for gpu in found)
        return found

    def read(self, uuids: Sequence[str], with_processes: bool) -> tuple[GpuReading, ...]:
        return tuple(self._read(uuid, with_processes) for uuid in uuids)

    def nvlinked(self, uuids: Sequence[str]) -> frozenset[frozenset[str]]:
        # The driver answers the same for a pair in either order: it tells of the path, not of a direction.
        return frozenset(frozenset(pair) for pair in combinations(uuids, 2) if self._linked(*pair))

    def addresses(self, uuids: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._address(uuid) for uuid in uuids)

    def health(self, uuids: Sequence[str]) -> tuple[GpuHealth, ...]:
        with self._session.open("ask for the health of the GPUs") as nvml:
            return tuple(self._health(nvml, uuid) for uuid in uuids)

    def versions(self) -> dict[str, str]:
        with self._session.open("ask for the driver's version") as nvml:
            driver = if_told(nvml, nvml.nvmlSystemGetDriverVersion)
            cuda = if_told(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
        told = {"driver": driver, "cuda": cuda and f"{cuda // 1000}.{cuda % 1000 // 10}"}
        return {what: str(version) for what, version in told.items() if version}

    def _identify(self, index: int, count: int) -> Gpu:
        uuid, name = "", ""
        with self._session.open(f"identify GPU {index}") as nvml:
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
                total, parts = memory(nvml, handle).total, slices(nvml, partial(if_told, nvml), handle) or ()
            except nvml.NVMLError as error:
                if not (why := recovery.unknown(error)):
                    raise
                place = bus.address(index, count, self._devices)
                lost = f"{why}, at {place}" if place else why
                return Gpu(index=index, uuid=uuid, name=name or "a lost GPU", memory_total_bytes=0, lost=lost)
        return Gpu(index=index, uuid=uuid, name=name, memory_total_bytes=total, slices=parts)

    def _read(self, uuid: str, with_processes: bool) -> GpuReading:
        with self._session.open(f'read GPU "{uuid}"') as nvml:
            place = self._session.find(nvml, uuid)
            handle = place.handle
            utilisation = power = processes = None
            if not place.sliced:
                utilisation = if_told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
                power = if_told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle))
            if with_processes:
                processes = if_told(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
            held = memory(nvml, handle)
            return GpuReading(
                uuid=uuid,
                index=place.index,
                memory_used_bytes=held.used,
                memory_total_bytes=held.total,
                utilisation_percent=None if utilisation is None else utilisation.gpu,
                power_mw=power,
                processes=None if processes is None else tuple((p.pid, p.usedGpuMemory) for p in processes),
            )

    def _linked(self, one: str, other: str) -> bool:
        doing = f'tell whether NVLink joins GPU "{one}" and GPU "{other}"'
        with self._session.open(doing) as nvml:
            handles = [self._session.find(nvml, uuid).whole for uuid in (one, other)]
            status = if_told(nvml, lambda: nvml.nvmlDeviceGetP2PStatus(*handles, nvml.NVML_P2P_CAPS_INDEX_NVLINK))
            if status is None or status == nvml.NVML_P2P_STATUS_UNKNOWN:
                raise GpusUnobserved(f"cannot {doing}: the driver does not say")
            return bool(status == nvml.NVML_P2P_STATUS_OK)

    def _address(self, uuid: str) -> str:
        with self._session.open(f'tell the PCI address of GPU "{uuid}"') as nvml:
            return str(nvml.nvmlDeviceGetPciInfo(self._session.find(nvml, uuid).whole).busId)

    def _health(self, nvml: Any, uuid: str) -> GpuHealth:
        gpu = Questions(nvml, self._session)
        found = gpu.told(lambda: self._session.find(nvml, uuid), searched=True)
        action = None
        if found is not None:
            # What only a GPU that works can answer; then what every driver answers that knows the question.
            gpu.told(lambda: memory(nvml, found.handle))
            action = gpu.told(lambda: recovery.action(nvml, found.whole))
        wanted = action if action is not None and action != recovery.ACTIONS[0] else ""
        return GpuHealth(uuid=uuid, lost=gpu.lost, recovery_action=wanted)
