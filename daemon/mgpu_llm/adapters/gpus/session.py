"""One session with NVML. Only the driver's thread may touch it: any line here can block, also the text of an error."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mgpu_llm.adapters.gpus import recovery
from mgpu_llm.adapters.gpus.told import GpusUnobserved
from mgpu_llm.core.slices import is_slice

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


@dataclass(frozen=True, slots=True)
class Place:
    """NVML's handle of a GPU or a MIG slice, and index and handle of the whole GPU."""

    handle: Any
    index: int
    whole: Any
    sliced: bool


class Session:
    """NVML, initialised when it is first wanted, and again after any error: a lost GPU stays lost to the session that lost
    it."""

    def __init__(self) -> None:
        self._initialised = False
        self._stale = False
        #: By UUID, for as long as NVML stays initialised, which looks it up among all GPUs.
        self._places: dict[str, Place] = {}

    @contextlib.contextmanager
    def open(self, doing: str) -> Iterator[Any]:
        """The module pynvml, initialised. An NVMLError inside becomes GpusUnobserved, and the next one starts afresh."""
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

    def find(self, nvml: Any, uuid: str) -> Place:
        """Where a GPU is, or a MIG slice."""
        if uuid not in self._places:
            handle = whole = _searched(nvml, uuid)
            if sliced := is_slice(uuid):
                whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            # A slice's own index counts the slices of its GPU (nvml.h, nvmlDeviceGetIndex).
            self._places[uuid] = Place(handle, nvml.nvmlDeviceGetIndex(whole), whole, sliced)
        return self._places[uuid]

    def spoil(self) -> None:
        """A GPU has failed in a call that tells of the others all the same: the next one starts afresh."""
        self._stale = True

    def _end(self, nvml: Any) -> None:
        self._initialised = self._stale = False
        self._places = {}
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _searched(nvml: Any, uuid: str) -> Any:
    """Its handle. The search by UUID asks every GPU, and fails where any is lost (nvml.h, nvmlDeviceGetHandleByUUID): then they
    are asked one by one, so that only who is lost itself is called so. Raises NVMLError."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        if error.value not in recovery.LOST:
            raise
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                if nvml.nvmlDeviceGetUUID(handle) == uuid:
                    return handle
        raise


class Questions:
    """Questions to one GPU, each of which it may leave open. Once it is `lost`, which says why, it is asked no more."""

    def __init__(self, nvml: Any, session: Session) -> None:
        self._nvml = nvml
        self._session = session
        self.lost = ""

    def told(self, ask: Callable[[], T], *, searched: bool = False) -> T | None:
        """What it tells, or None; `searched` if the question is where it is. Raises NVMLError where there is no driver."""
        if self.lost:
            return None
        try:
            return if_told(self._nvml, ask)
        except self._nvml.NVMLError as error:
            self._session.spoil()
            self.lost = recovery.lost(error, searched=searched)
            return None


def memory(nvml: Any, handle: object) -> Any:
    """Memory with the driver's reserve apart from what is used, or both in one where the driver knows only that."""
    apart = if_told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    return nvml.nvmlDeviceGetMemoryInfo(handle) if apart is None else apart


def if_told(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What the driver or the GPU answers, or None where it says that it does not tell. Raises NVMLError."""
    try:
        return ask()
    except nvml.NVMLError as error:
        if error.value not in _NOT_TOLD:
            raise
        return None
