"""What the driver tells of GPUs, and that it tells nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MigSlice:
    """A part of a GPU that is a GPU of its own to programs; `index` is its number on that GPU."""

    index: int
    uuid: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU as an engine is given it: a whole one, or a MIG slice of one. `index` is NVML's of the whole, in PCI bus order:
    CUDA counts so only under CUDA_DEVICE_ORDER=PCI_BUS_ID. A whole one that is divided has `slices`; a slice has in `whole` the
    UUID of the GPU that it is of, and that one's name. `lost` says why it cannot be used ("GPU is lost (NVML error 15), at
    00000000:17:00.0"), "" is that it answers: of a lost one only the index is certain, what else it does not tell is "", 0 and
    ()."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    slices: tuple[MigSlice, ...] = ()
    whole: str = ""
    lost: str = ""

    @property
    def entry(self) -> str:
        """What stands for it in CUDA_VISIBLE_DEVICES: CUDA knows slices by their UUIDs alone."""
        return self.uuid if self.whole else str(self.index)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """What one GPU does now; None is "not observed", never zero. Of a MIG slice the memory and the processes are its own, `index`
    is its GPU's, and utilisation and power are not observed: NVML tells of neither in MIG mode.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuHealth:
    """Whether one GPU can be used at all. `lost` says why it cannot ("GPU is lost (NVML error 15)"), "" is that it answers.

    `recovery_action` is what the driver asks of the operator: "reset", "reboot", "drain-p2p", ... as in
    recovery.ACTIONS; "" is nothing, or that this driver or GPU does not tell (drivers do from 570 on).
    """

    uuid: str
    lost: str
    recovery_action: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A process that uses a GPU; `kind` is "compute", "graphics" or "compute+graphics"."""

    pid: int
    used_bytes: int | None
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDetails:
    """All that one GPU tells; None is "not told", never zero. `lost` says why the GPU tells no more, "" is that it does;
    `untold` why it cannot be asked, though it may be well.

    `memory_used_bytes` leaves out the driver's reserve; where `memory_reserved_bytes` is None the driver cannot tell the
    two apart, and its figure holds both. `ecc_uncorrected` are the errors since the driver was loaded. `recovery_action`
    is one of recovery.ACTIONS, "none" among them. `mig_slices` is () without MIG. `compute_mode` is "default",
    "exclusive-process" or "prohibited".
    """

    index: int
    uuid: str | None
    name: str | None
    pci: str | None
    lost: str
    untold: str = ""
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    utilisation_percent: int | None = None
    power_mw: int | None = None
    power_limit_mw: int | None = None
    temperature_c: int | None = None
    ecc: bool | None = None
    ecc_uncorrected: int | None = None
    recovery_action: str | None = None
    mig: bool | None = None
    mig_slices: tuple[MigSlice, ...] | None = None
    compute_mode: str | None = None
    persistence: bool | None = None
    processes: tuple[GpuProcess, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPair:
    """What joins two GPUs, by their indices; None is "not told". `path` is the way over PCIe: "internal", "single" (one
    switch), "multiple" (switches), "hostbridge", "node" (bridges of one NUMA node) or "system". `p2p_read` and
    `p2p_write` are "ok", or why they cannot reach each other's memory, as over NVLink so over PCIe."""

    one: int
    other: int
    path: str | None = None
    nvlink: bool | None = None
    p2p_read: str | None = None
    p2p_write: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HostGpus:
    """All GPUs of the host by index, each two of them, and the versions of driver, CUDA and NVML; None is "not told"."""

    driver: str | None
    cuda: str | None
    nvml: str | None
    gpus: tuple[GpuDetails, ...]
    pairs: tuple[GpuPair, ...]


class GpusUnobserved(Exception):  # noqa: N818 - a state of knowledge, as the core's event of this name
    """Nothing is known of the GPUs at this moment, and `reason` says why. It may pass: ask again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
