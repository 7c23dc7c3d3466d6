"""The device files of the GPUs, and whether the user who will run the engine may use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject, listed
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("devices")
#: What CUDA opens besides the GPUs themselves; the driver makes the second when it is first needed, by a program of root's.
CONTROL: Final = "/dev/nvidiactl"
UNIFIED: Final = "/dev/nvidia-uvm"
#: Of MIG, a file for each slice (NVIDIA's MIG user guide, "Device Nodes and Capabilities").
CAPABILITIES: Final = "/dev/nvidia-caps"
OPENED_BY: Final = (
    "sudo nvidia-modprobe -f FILE for each: find /proc/driver/nvidia/capabilities -path '*/gi*' -name access"
)
MADE_BY: Final = {CONTROL: "sudo nvidia-modprobe -c 0", UNIFIED: "sudo nvidia-modprobe -u -c 0"}


def check(system: System, who: Account, count: int | None = None, *, sliced: bool = False) -> Iterator[Finding]:
    """`count` is how many GPUs NVML tells of, None where it does not; `sliced`: whether a MIG slice is wanted. A host without a
    driver is no matter of this check."""
    gpus = [f"/dev/{name}" for name in system.names("/dev") if name.removeprefix("nvidia").isdecimal()]
    if not gpus and not system.exists("/proc/driver/nvidia/version"):
        return
    if not gpus:
        yield SUBJECT.problem("devices-present", "there is no /dev/nvidia0", _cure(system, "sudo nvidia-modprobe -c 0"))
    for name in (CONTROL, UNIFIED):
        if not system.exists(name):
            yield SUBJECT.problem("devices-present", f"there is no {name}", _cure(system, MADE_BY[name]))
    if count is not None and 0 < len(gpus) < count:
        seen = f"{len(gpus)} device files for {count} GPUs"
        yield SUBJECT.problem("devices-present", seen, _cure(system, f"sudo nvidia-modprobe -c {count - 1}"))
    if sliced and not system.names(CAPABILITIES):
        seen = f"there is nothing in {CAPABILITIES}, through which a MIG slice is opened"
        yield SUBJECT.problem("devices-present", seen, _cure(system, OPENED_BY))
    yield _access(system, who, [name for name in (*gpus, CONTROL, UNIFIED) if system.exists(name)])


def _access(system: System, who: Account, names: list[str]) -> Finding:
    may = account.access(who, [system.path(name) for name in names])
    if may is None:
        why = f"only root, or {who.name}, can find out what {who.name} may open"
        return SUBJECT.unknown("devices-access", why, f"sudo mgpuctl doctor --user {who.name}")
    closed = [name for name, can in zip(names, may, strict=True) if not {"r", "w"} <= set(can)]
    if not closed:
        return SUBJECT.ok("devices-access", f"{who.name} may read and write all {len(names)} device files")
    seen = f"{who.name} (in {listed(who.group_names, 6)}) may not read and write {listed(closed)}"
    return SUBJECT.problem("devices-access", seen, _admission(system, who, closed[0]))


def _admission(system: System, who: Account, name: str) -> str:
    """The group that may, or else the driver's own setting for its files (NVIDIA's README, "device files")."""
    try:
        group, mode = account.owner(system.path(name))
    except OSError:
        return ""
    if mode & 0o060 == 0o060 and group != "root":
        return f"sudo usermod -aG {group} {who.name}, then start its session or service anew"
    return "echo 'options nvidia NVreg_DeviceFileMode=0666' | sudo tee /etc/modprobe.d/nvidia-files.conf (from the next boot on)"


def _cure(system: System, command: str) -> str:
    return "docker run --gpus all (with the NVIDIA Container Toolkit)" if system.in_container() else command
