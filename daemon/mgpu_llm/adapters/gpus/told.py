"""What the driver tells of GPUs, and that it tells nothing."""

from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuHealth:
    """Whether one GPU can be used at all. `lost` says why it cannot ("GPU is lost (NVML error 15)"), "" is that it answers.

    `recovery_action` is what the driver asks of the operator: "reset", "reboot", "drain-p2p", ... as in
    recovery.ACTIONS; "" is nothing, or that this driver or GPU does not tell (drivers do from 570 on).
    """

    uuid: str
    lost: str
    recovery_action: str


class GpusUnobserved(Exception):  # noqa: N818 - a state of knowledge, as the core's event of this name
    """Nothing is known of the GPUs at this moment, and `reason` says why. It may pass: ask again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
