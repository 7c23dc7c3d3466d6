"""The GPUs that the config names: whether they are there and well, and who has their memory."""

from __future__ import annotations

import pwd
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from mgpu_llm.adapters import gpu_locks
from mgpu_llm.adapters.gpus import Gpu, GpuDetails, GpuPair, Gpus, GpusUnobserved, HostGpus, resolve
from mgpu_llm.core.redaction import argv
from mgpu_llm.core.slices import is_slice
from mgpu_llm.doctor.finding import Finding, Subject, gib, listed
from mgpu_llm.doctor.links import Pair
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("GPUs")
#: The first question wakes the GPUs, which takes seconds each without persistence mode.
LIMIT_S: Final = 12.0
#: Memory that is taken by no process which the driver names: with less nothing is said.
UNEXPLAINED_BYTES: Final = 1 << 30
_LONGEST: Final = 60
#: From a worker up to mgpud there are three.
_MOST_PARENTS: Final = 8
_RESET: Final = "sudo nvidia-smi --gpu-reset -i {index} with nothing on it, or reboot"
#: By what the driver asks for (recovery.ACTIONS of the adapter), what to do.
_RECOVERY: Final = {
    "reboot": "sudo reboot",
    "system-reboot": "sudo reboot",
    "recover-imex-domain": "recover its IMEX domain (NVIDIA's IMEX guide), or reboot its hosts",
    "drain-p2p": "stop what uses its peers, then " + _RESET,
}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the driver tells. `host` is None where it tells nothing, and `silence` says why; `misnamed` is what is wrong with the
    config's names. `chosen` are the GPUs that the config means, in its order, and `spares` those that may stand in for one."""

    host: HostGpus | None = None
    chosen: tuple[GpuDetails, ...] = ()
    spares: tuple[GpuDetails, ...] = ()
    silence: str = ""
    misnamed: str = ""

    @property
    def driver(self) -> str:
        return (self.host.driver if self.host else None) or ""

    @property
    def cuda(self) -> str:
        return (self.host.cuda if self.host else None) or ""

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The memory of each chosen GPU, in bytes; None where it is not told of all, or there are none."""
        told = tuple(gpu.memory_total_bytes for gpu in self.chosen if gpu.memory_total_bytes is not None)
        return told if told and len(told) == len(self.chosen) else None

    @property
    def pairs(self) -> list[Pair]:
        """Of the chosen GPUs."""
        meant = {gpu.index for gpu in self.chosen}
        found = self.host.pairs if self.host else ()
        return [_pair(pair) for pair in found if {pair.one, pair.other} <= meant]


async def ask(driver: Gpus, use: Literal["all"] | Sequence[int | str], spares: Sequence[int | str] = ()) -> Told:
    """Waits for the driver some seconds at most. Raises nothing."""
    try:
        host = await driver.details(LIMIT_S)
    except GpusUnobserved as silence:
        return Told(silence=silence.reason)
    known = [
        Gpu(
            index=gpu.index,
            uuid=gpu.uuid or "",
            name=gpu.name or "a lost GPU",
            memory_total_bytes=0,
            slices=gpu.mig_slices or (),
            lost=gpu.lost,
        )
        for gpu in host.gpus
    ]
    try:
        meant = resolve(use, known)
        # Which lost GPU a name is taken for may depend on the others that are named.
        together = meant if use == "all" else resolve((*use, *spares), known)
    except ValueError as error:
        return Told(host=host, misnamed=str(error))
    return Told(
        host=host,
        chosen=tuple(_meant(host, gpu) for gpu in together[: len(meant)]),
        spares=tuple(_meant(host, gpu) for gpu in together[len(meant) :]),
    )


def _meant(host: HostGpus, gpu: Gpu) -> GpuDetails:
    """Of a slice, what is told of its GPU, with its own name and memory; by whom that is taken, nobody tells."""
    found = host.gpus[gpu.index]
    for part in found.mig_slices or ():
        if part.uuid == gpu.uuid:
            total, used = part.memory_total_bytes, part.memory_used_bytes
            return replace(found, uuid=part.uuid, memory_total_bytes=total, memory_used_bytes=used, processes=None)
    return found


def check(system: System, told: Told) -> Iterator[Finding]:
    """Of a config that wants GPUs."""
    if told.host is None:
        # Where no driver is loaded, that is said by the driver's own check.
        if system.exists("/proc/driver/nvidia/version"):
            seen, _, cure = told.silence.partition("; ")
            yield SUBJECT.problem("gpus-answer", seen, cure or "sudo dmesg | grep -e NVRM -e Xid; if it hangs, reboot")
    elif told.misnamed:
        yield SUBJECT.problem("gpus-present", f"gpus.use or gpus.spares: {told.misnamed}", "nvidia-smi -L lists them")
    elif not told.chosen:
        yield SUBJECT.problem("gpus-present", "the driver tells of no GPU", "lspci -d 10de: ; sudo dmesg | grep NVRM")
    else:
        yield from _present(told.chosen, len(told.host.gpus))
        for one in (_lost, _recovery, _ecc, _mig, _compute_mode, _persistence):
            yield from one((*told.chosen, *told.spares))
        yield from _slices((*told.chosen, *told.spares), len(told.host.gpus))
        yield from _memory(system, (*told.chosen, *told.spares))


def reserved(told: Told, folders: Sequence[Path], runtime_dir: Path, *, shared: bool) -> Iterator[Finding]:
    """Of GPUs that instances of other run-time folders have reserved, in the lock `folders`; with `shared` a GPU may be used by
    several who all say so."""
    own = str(runtime_dir.resolve())
    for gpu in (*told.chosen, *told.spares):
        others = [one for one in gpu_locks.holders(folders, gpu.uuid or "") if one.runtime_dir != own]
        if others and not (shared and all(one.shared for one in others)):
            seen = f"GPU {gpu.index} is reserved by another mgpud ({'; '.join(map(str, others))})"
            yield SUBJECT.problem(
                "gpus-reserved", seen, "stop that one, name other GPUs, or gpus.shared = true in both configs"
            )


def holder(system: System, pid: int, used: int | None) -> str:
    """As in "pid 71 (alice, 2.0 GiB): python train.py"."""
    words = [word for word in system.text(f"/proc/{pid}/cmdline").split("\0") if word]
    command = " ".join(argv(words))[:_LONGEST] or system.text(f"/proc/{pid}/comm").strip() or "not to be seen from here"
    details = ", ".join(filter(None, (_user(system, pid), gib(used) if used is not None else "")))
    return f"pid {pid}" + (f" ({details})" if details else "") + f": {command}"


def _present(chosen: Sequence[GpuDetails], count: int) -> Iterator[Finding]:
    names = sorted({gpu.name or "unknown" for gpu in chosen})
    yield SUBJECT.ok("gpus-present", f"{_numbers(chosen)} of {count}: {listed(names)}")
    if len(names) > 1:
        seen = f"GPUs of several kinds ({listed(names)}): the one with least memory decides for all"
        yield SUBJECT.warning("gpus-alike", seen, "name alike ones in gpus.use: nvidia-smi -L lists them")


def _lost(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    for gpu in chosen:
        if gpu.lost:
            yield SUBJECT.problem("gpus-lost", f"GPU {gpu.index}: {gpu.lost}", _RESET.format(index=gpu.index))
        elif gpu.untold:
            yield SUBJECT.unknown("gpus-lost", f"GPU {gpu.index}: {gpu.untold}", "sudo mgpuctl doctor")


def _recovery(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    asked = [gpu for gpu in chosen if gpu.recovery_action not in (None, "none")]
    for gpu in asked:
        cure = _RECOVERY.get(f"{gpu.recovery_action}", _RESET).format(index=gpu.index)
        yield SUBJECT.problem("gpus-recovery", f"GPU {gpu.index}: the driver asks for {gpu.recovery_action}", cure)
    if not asked and all(gpu.recovery_action for gpu in chosen):
        yield SUBJECT.ok("gpus-recovery", "the driver asks for no reset")


def _ecc(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    broken = [gpu for gpu in chosen if gpu.ecc_uncorrected]
    for gpu in broken:
        seen = (
            f"GPU {gpu.index}: {gpu.ecc_uncorrected} memory errors since the driver was loaded that ECC could not mend"
        )
        yield SUBJECT.warning("gpus-ecc", seen, f"{_RESET.format(index=gpu.index)}; if they come back, replace it")
    if not broken and all(gpu.ecc_uncorrected == 0 for gpu in chosen):
        yield SUBJECT.ok("gpus-ecc", "no memory error that ECC could not mend")


def _mig(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    for gpu in chosen:
        if gpu.mig and not is_slice(gpu.uuid or ""):
            seen = f"GPU {gpu.index} is in MIG mode, with {len(gpu.mig_slices or ())} slices, and cannot be used as a whole"
            cure = f"name a slice in gpus.use (nvidia-smi -L lists them), or sudo nvidia-smi -i {gpu.index} -mig 0"
            yield SUBJECT.problem("gpus-mig", seen, cure)


def _slices(chosen: Sequence[GpuDetails], count: int) -> Iterator[Finding]:
    """vLLM takes a slice's number on its GPU for the number of a GPU, and ends where there is none of it ("Invalid Argument";
    platforms/cuda.py, device_control_id_to_physical_device_id, 0.24.0 to 0.32.0; nvml.h, nvmlDeviceGetIndex)."""
    for gpu in chosen:
        for part in gpu.mig_slices or ():
            if part.uuid != gpu.uuid:
                continue
            seen = f"{part.uuid} is slice {part.index} of GPU {gpu.index}"
            if part.index < count:
                yield SUBJECT.ok("gpus-slice", seen)
            else:
                why = f"{seen}, and vLLM (0.24 to 0.32) takes that number for a GPU's, of which there are {count}"
                yield SUBJECT.warning(
                    "gpus-slice", why, f"name a slice of a number below {count}: nvidia-smi -L has them"
                )


def _compute_mode(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    for gpu in chosen:
        cure = f"sudo nvidia-smi -i {gpu.index} -c DEFAULT"
        if gpu.compute_mode == "prohibited":
            yield SUBJECT.problem("gpus-compute-mode", f"GPU {gpu.index} is closed for computing (prohibited)", cure)
        elif gpu.compute_mode not in (None, "default"):
            seen = f"GPU {gpu.index} lets one process in ({gpu.compute_mode}): one that is left over there keeps the engine out"
            yield SUBJECT.warning("gpus-compute-mode", seen, cure)


def _persistence(chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    if asleep := [gpu for gpu in chosen if gpu.persistence is False]:
        seen = f"{_numbers(asleep)}: no persistence mode, so the driver sets them up anew, in seconds, for each first process"
        yield SUBJECT.warning("gpus-persistence", seen, "sudo nvidia-smi -pm 1, at every boot")


def _memory(system: System, chosen: Sequence[GpuDetails]) -> Iterator[Finding]:
    untold = [gpu for gpu in chosen if gpu.memory_used_bytes is None and not gpu.lost]
    taken = [gpu for gpu in chosen if gpu.processes or (gpu.memory_used_bytes or 0) > UNEXPLAINED_BYTES]
    for gpu in taken:
        total = "" if gpu.memory_total_bytes is None else f" of {gib(gpu.memory_total_bytes)}"
        held = f"GPU {gpu.index}: {gib(gpu.memory_used_bytes or 0)}{total} taken, by"
        whose = "; ".join(holder(system, process.pid, process.used_bytes) for process in gpu.processes or ())
        nobody = "nobody whom the driver names: a process of another container, or one that hangs in the driver"
        cure = "; ".join([*_freed(system, gpu), "or name other GPUs in gpus.use"])
        yield SUBJECT.warning("gpus-memory", f"{held} {whose or nobody}", cure)
    if untold:
        yield SUBJECT.unknown("gpus-memory", f"the driver does not tell how much of {_numbers(untold)} is taken")
    elif not taken:
        yield SUBJECT.ok("gpus-memory", "nobody has memory on them")


def _freed(system: System, gpu: GpuDetails) -> Iterator[str]:
    """How it gets free. Whom to kill is said only where it is certain who that is, and that nobody begins it anew."""
    users = {process.pid: process for process in gpu.processes or ()}
    engines = {pid for pid in users if _is_supervised(system, pid)}
    drawing = {pid for pid, process in users.items() if process.kind == "graphics"}
    others = [pid for pid in users if pid not in engines | drawing]
    if not users:
        yield f"sudo fuser -v /dev/nvidia{gpu.index}"
    if engines:
        yield "stop the mgpud whose engine it is (mgpuctl stop)"
    if drawing:
        yield "sudo systemctl isolate multi-user.target ends the desktop"
    if others and system.in_container():
        yield "end these where they run: their numbers may be the host's, and another process's here"
    elif there := [str(pid) for pid in others if system.exists(f"/proc/{pid}")]:
        yield f"sudo kill {' '.join(there)}"


def _is_supervised(system: System, pid: int) -> bool:
    """Whether mgpud is above it."""
    for _ in range(_MOST_PARENTS):
        found = re.search(r"^PPid:\s*(\d+)$", system.text(f"/proc/{pid}/status"), re.MULTILINE)
        if found is None or (pid := int(found[1])) <= 1:
            return False
        words = system.text(f"/proc/{pid}/cmdline").split("\0")[:4]
        if any(Path(word).name in ("mgpud", "mgpu_llm") for word in words):
            return True
    return False


def _pair(told: GpuPair) -> Pair:
    if told.nvlink:
        return Pair(one=told.one, other=told.other, how="nvlink")
    ways = (told.p2p_read, told.p2p_write)
    if refused := next((way for way in ways if way not in (None, "ok")), None):
        return Pair(one=told.one, other=told.other, how="none", why=refused)
    return Pair(one=told.one, other=told.other, how="unknown" if None in ways else "pcie")


def _numbers(gpus: Sequence[GpuDetails]) -> str:
    return f"GPU{'s' if gpus[1:] else ''} {listed([str(gpu.index) for gpu in gpus], 16)}"


def _user(system: System, pid: int) -> str:
    try:
        return pwd.getpwuid(system.path(f"/proc/{pid}").stat().st_uid).pw_name
    except (OSError, KeyError):
        return ""
