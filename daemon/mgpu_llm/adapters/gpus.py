"""The host's GPUs as the NVIDIA driver tells them through NVML (nvidia-ml-py), without ever waiting on the driver.

A driver call may never return: NVML then sits in the kernel and nothing can take it back. So all calls run in one
daemon thread; a caller waits for it up to a deadline and then goes on. Nothing is queued behind a call that is overdue.
"""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One whole GPU. `index` is NVML's, in PCI bus order: CUDA counts so only under CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """What one GPU does now; None is "not observed", never zero.

    `memory_used_bytes` leaves out what the driver keeps for itself (NVML's v2 call, drivers from 510 on); an older
    driver cannot tell the two apart and its figure holds both. `processes` are the compute processes as (pid, bytes).
    """

    uuid: str
    index: int
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_percent: int | None
    power_mw: int | None
    processes: tuple[tuple[int, int | None], ...] | None


class GpusUnobserved(Exception):  # noqa: N818 - a state of knowledge, as the core's event of this name
    """Nothing is known of the GPUs at this moment, and `reason` says why. It may pass: ask again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Gpus:
    """The GPUs of this host. Make it once and keep it: it holds one thread and one NVML session, both for good.

    The driver, or its library, may come up after us, go, and come back: every failed call starts afresh at the next.
    """

    def __init__(self) -> None:
        self._driver = _DriverThread()
        self._nvml = _Nvml()

    async def inventory(self, deadline_s: float = 10) -> tuple[Gpu, ...]:
        """All GPUs by index, from 0 without a gap. The first call wakes the GPUs, which can take seconds.

        Raises GpusUnobserved.
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

    async def versions(self, deadline_s: float = 2) -> dict[str, str]:
        """The driver's version, and the CUDA version that it supports, as far as it tells. Raises GpusUnobserved."""
        return await self._driver.call(self._nvml.versions, deadline_s)


def resolve(wanted: Literal["all"] | Sequence[int | str], inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs that `wanted` names, in its order: "all", or indices and UUIDs ("GPU-..." or, as in CUDA, a unique
    beginning of one). `inventory` is the whole of the host.

    Raises ValueError with one line that names all that is wrong.
    """
    if wanted == "all":
        return tuple(inventory)
    matches = {name: _matching(name, inventory) for name in wanted}
    missing = [name for name, found in matches.items() if not found]
    problems = [f"no GPU {_spoken(missing)}: this host has {_describe(inventory)}"] if missing else []
    problems += [_not_one(name, found) for name, found in matches.items() if len(found) > 1]
    chosen = [(name, matches[name][0]) for name in wanted if len(matches[name]) == 1]
    for gpu in inventory:
        names = [name for name, choice in chosen if choice is gpu]
        if len(names) > 1:
            problems.append(f"GPU {gpu.index} is named {len(names)} times ({_spoken(names)})")
    if any(str(name).startswith("MIG-") for name in missing):
        problems.append("a MIG slice cannot be used, name whole GPUs")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(gpu for _, gpu in chosen)


def _matching(name: int | str, inventory: Sequence[Gpu]) -> tuple[Gpu, ...]:
    if isinstance(name, int):
        return tuple(gpu for gpu in inventory if gpu.index == name)
    if not name.startswith("GPU-"):
        return ()
    whole = tuple(gpu for gpu in inventory if gpu.uuid == name)
    return whole or tuple(gpu for gpu in inventory if gpu.uuid.startswith(name))


def _not_one(name: int | str, found: Sequence[Gpu]) -> str:
    return (
        f'"{name}" begins the UUID of {len(found)} GPUs ({", ".join(str(gpu.index) for gpu in found)}), give more of it'
    )


def _spoken(names: Sequence[int | str]) -> str:
    quoted = [str(name) if isinstance(name, int) else f'"{name}"' for name in names]
    return " and ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


def _describe(inventory: Sequence[Gpu]) -> str:
    if not inventory:
        return "none"
    first, last = inventory[0].index, inventory[-1].index
    kinds = Counter(gpu.name for gpu in inventory)
    span = str(first) if first == last else f"{first}-{last}"
    return f"{span} ({', '.join(f'{count} x {name}' for name, count in kinds.items())})"


@dataclass(kw_only=True, eq=False)
class _Call:
    work: Callable[[], Any]
    asked_at: float
    answer: Future[Any] = field(default_factory=Future)
    overdue: bool = False


class _DriverThread:
    """One thread of our own: an executor's are joined when the interpreter exits, and a stuck one never ends."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._running: _Call | None = None
        threading.Thread(target=self._serve, name="nvml", daemon=True).start()

    async def call(self, work: Callable[[], T], deadline_s: float) -> T:
        """What `work` returns or raises, or GpusUnobserved when that has not come after `deadline_s`."""
        clock = asyncio.get_running_loop().time
        running = self._running
        if running is not None and running.overdue:
            raise GpusUnobserved(_silence(clock() - running.asked_at))
        call = _Call(work=work, asked_at=clock())
        self._calls.put(call)
        try:
            async with asyncio.timeout(deadline_s):
                result: T = await asyncio.wrap_future(call.answer)
                return result
        except TimeoutError:
            # What blocks the thread is our call, or one before it; a later one has its own deadline.
            running = self._running
            culprit = running if running is not None and running.asked_at <= call.asked_at else call
            culprit.overdue = True
            raise GpusUnobserved(_silence(clock() - culprit.asked_at)) from None

    def _serve(self) -> None:
        while True:
            call = self._calls.get()
            if not call.answer.set_running_or_notify_cancel():
                continue  # it waited behind an overdue call, and its caller is gone
            self._running = call
            deliver = _attempt(call)
            # First free, then answered: who gets the answer may call again at once.
            self._running = None
            deliver()


def _attempt(call: _Call) -> Callable[[], None]:
    try:
        result = call.work()
    except BaseException as error:  # noqa: BLE001 - it is the caller's, and the thread must outlive it
        failure = error
        return lambda: call.answer.set_exception(failure)
    return lambda: call.answer.set_result(result)


def _silence(silent_s: float) -> str:
    return f"the NVIDIA driver has not answered for {silent_s:.{1 if silent_s < 10 else 0}f} s"


# NVML's return codes (nvml.h, nvmlReturn_t). With these a call says that this driver or GPU does not tell: not
# supported, no permission, function not found, no data, argument version mismatch.
_NOT_TOLD = frozenset({3, 4, 13, 21, 25})
_CURES = {
    4: "; give this user access to /dev/nvidia*",
    9: '; load the driver ("modprobe nvidia")',
    12: "; install the NVIDIA driver (libnvidia-ml.so.1)",
    18: "; the driver was replaced while in use: reboot, or reload its modules and restart this service",
}


class _Nvml:
    """The NVML session. Only the driver's thread may touch it: any line here can block, also the text of an error."""

    def __init__(self) -> None:
        self._initialised = False
        #: By UUID, for as long as NVML stays initialised: its handle and index, which it looks up among all GPUs.
        self._handles: dict[str, tuple[Any, int]] = {}

    def inventory(self) -> tuple[Gpu, ...]:
        with self._session("list the GPUs") as nvml:
            count = nvml.nvmlDeviceGetCount()
        return tuple(self._identify(index) for index in range(count))

    def read(self, uuids: Sequence[str], with_processes: bool) -> tuple[GpuReading, ...]:
        return tuple(self._read(uuid, with_processes) for uuid in uuids)

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
            if uuid not in self._handles:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                self._handles[uuid] = (handle, nvml.nvmlDeviceGetIndex(handle))
            handle, index = self._handles[uuid]
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

    @contextlib.contextmanager
    def _session(self, doing: str) -> Iterator[Any]:
        """NVML, initialised; after any error it is shut down, for a lost GPU stays lost to the session that lost it."""
        import pynvml as nvml  # here, for its size and because it is wanted in this thread alone

        try:
            if not self._initialised:
                nvml.nvmlInit()
                self._initialised = True
            yield nvml
        except nvml.NVMLError as error:
            reason = f"cannot {doing}: {error} (NVML error {error.value}){_CURES.get(error.value, '')}"
            if self._initialised:
                self._initialised = False
                self._handles = {}
                with contextlib.suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()
            raise GpusUnobserved(reason) from error


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
