"""What stands between GPUs that reach each other over PCI Express: IOMMU, access control of the bridges, virtualisation.

The driver says that peer-to-peer works, the writes get lost, and the first collective never ends: the most frequent cause of a
load that hangs (NCCL's user guide, "GPU troubleshooting": PCI access control services, and its NVIDIA/nccl#199, #606).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mgpu_llm.doctor.finding import Finding, Subject, listed
from mgpu_llm.doctor.system import DISPLAY, System

SUBJECT: Final = Subject("links")
#: PCI Express, extended capabilities: they begin here, ACS has this id, and its control register redirects what one peer asks
#: of another, and the answer, to the processor with these bits (linux/pci_regs.h).
EXTENDED: Final = 0x100
ACS: Final = 0x0D
REDIRECTS: Final = 0x04 | 0x08
#: All of the configuration space, of which the kernel shows others than root the first 64 bytes.
WHOLE: Final = 4096
#: What DMI says of machines that are virtual, though the processor may hide it.
_VIRTUAL: Final = re.compile(
    r"QEMU|KVM|VMware|Xen|VirtualBox|innotek|Bochs|Microsoft Corporation Virtual|Google Compute|OpenStack|Firecracker"
)
_THROUGH: Final = (
    "iommu=pt on the kernel's command line (intel_iommu=off or amd_iommu=off where nothing needs it), then reboot"
)
_RUNG: Final = (
    'until then, what mgpud would find by itself: [engine] env.NCCL_P2P_DISABLE = "1" and '
    'args = ["--disable-custom-all-reduce"]'
)
#: Group types by which devices see memory as the IOMMU maps it (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
_TRANSLATED: Final = ("DMA", "DMA-FQ")

How = Literal["nvlink", "pcie", "none", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """How two GPUs reach each other by what the driver says; `why` there is no way, in the driver's words."""

    one: int
    other: int
    how: How
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.one}-{self.other}"


def virtual_machine(system: System) -> str:
    """What says that this is one, "" on bare metal."""
    if kind := system.text("/sys/hypervisor/type").strip():
        return f"hypervisor {kind}"
    made = " ".join(system.text(f"/sys/class/dmi/id/{name}").strip() for name in ("sys_vendor", "product_name"))
    if found := _VIRTUAL.search(made):
        return found[0]
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", system.text("/proc/cpuinfo"), re.MULTILINE)
    return "the processor says hypervisor" if flags else ""


def acs_control(config: bytes) -> int | None:
    """The ACS control register in a device's configuration space; None where it has none."""
    at, seen = EXTENDED, set[int]()
    while at >= EXTENDED and at + 8 <= len(config) and at not in seen:
        seen.add(at)
        (header,) = struct.unpack_from("<I", config, at)
        if header & 0xFFFF == ACS:
            return int(struct.unpack_from("<H", config, at + 6)[0])
        at = header >> 20
    return None


def pairs(found: Sequence[Pair]) -> Iterator[Finding]:
    """What the driver says of each pair."""
    joined = [pair for pair in found if pair.how == "nvlink"]
    over_pci = [pair.name for pair in found if pair.how == "pcie"]
    apart = [pair for pair in found if pair.how == "none"]
    if found and len(joined) == len(found):
        yield SUBJECT.ok("links-p2p", f"NVLink joins every two of them ({listed([pair.name for pair in found])})")
        return
    words = [f"{len(joined)} over NVLink ({listed([pair.name for pair in joined])})"] if joined else []
    untold = [pair.name for pair in found if pair.how == "unknown"]
    words += [f"{len(over_pci)} over PCI Express ({listed(over_pci)})"] if over_pci else []
    if apart:
        reasons = sorted({pair.why for pair in apart if pair.why})
        words += [
            f"{len(apart)} not at all ({listed([pair.name for pair in apart])}"
            + (f": {', '.join(reasons)})" if reasons else ")")
        ]
    if untold:
        yield SUBJECT.unknown("links-p2p", f"the driver does not tell how {listed(untold)} reach each other")
    if words:
        slower = "; those without go through host memory, which is slower but works" if apart else ""
        yield SUBJECT.ok("links-p2p", f"pairs by what the driver says: {', '.join(words)}{slower}")


def check(system: System, found: Sequence[Pair]) -> Iterator[Finding]:
    """`found` are the pairs of GPUs that the launch uses; one GPU has none, and then there is nothing to say."""
    if not found:
        return
    yield from pairs(found)
    at_risk = any(pair.how in ("pcie", "unknown") for pair in found)
    if machine := virtual_machine(system):
        yield _virtual(machine, at_risk=at_risk)
        return
    gpus = system.nvidia_devices(DISPLAY)
    if not gpus:
        return
    redirected, hidden = _access_control(system, gpus)
    yield _iommu(system, gpus, at_risk=at_risk)
    if redirected:
        seen = f"{len(redirected)} PCI bridges above the GPUs redirect what peers write (ACS): {listed(redirected)}"
        turned = "; ".join(f"sudo setpci -s {bridge} ECAP_ACS+0x6.w=0000" for bridge in redirected[:2])
        more = " and so on for each" if redirected[2:] else ""
        said = SUBJECT.problem if at_risk and _translated(system, gpus) else SUBJECT.warning if at_risk else None
        cure = f"{turned}{more}, at every boot; or ACS off in the BIOS; {_RUNG}"
        yield said("links-acs", seen, cure) if said else SUBJECT.ok("links-acs", f"{seen}; NVLink does not pass them")
    elif hidden:
        yield SUBJECT.unknown("links-acs", "only root sees the configuration of PCI bridges", "sudo mgpuctl doctor")
    else:
        yield SUBJECT.ok("links-acs", "no PCI bridge above the GPUs redirects what peers write (ACS)")


def _virtual(machine: str, *, at_risk: bool) -> Finding:
    if not at_risk:
        return SUBJECT.ok("links-virtual", f"a virtual machine ({machine}), and no pair goes over PCI Express")
    seen = f"a virtual machine ({machine}): peer-to-peer over PCI Express may hang there, or hand over wrong data"
    return SUBJECT.warning("links-virtual", seen, f"mgpuctl doctor --probe tells; where it fails, {_RUNG}")


def _iommu(system: System, gpus: Sequence[str], *, at_risk: bool) -> Finding:
    units = system.names("/sys/class/iommu")
    if not units:
        return SUBJECT.ok("links-iommu", "bare metal, the IOMMU is off")
    translated = _translated(system, gpus)
    options = " ".join(word for word in system.text("/proc/cmdline").split() if "iommu" in word)
    given = f"kernel: {options}" if options else "nothing on the kernel's command line"
    if not translated:
        return SUBJECT.ok("links-iommu", f"the IOMMU passes the GPUs through ({given})")
    seen = f"the IOMMU translates for {len(translated)} GPUs ({listed(translated)}; {given})"
    if not at_risk:
        return SUBJECT.ok("links-iommu", f"{seen}; no pair goes over PCI Express")
    lost = "peer-to-peer over PCI Express may lose its writes there, and the first collective hangs"
    return SUBJECT.warning("links-iommu", f"{seen}: {lost}", f"{_THROUGH}; {_RUNG}")


def _translated(system: System, gpus: Sequence[str]) -> list[str]:
    kinds = {gpu: system.text(f"/sys/bus/pci/devices/{gpu}/iommu_group/type").strip() for gpu in gpus}
    return [gpu for gpu, kind in kinds.items() if kind in _TRANSLATED]


def _access_control(system: System, gpus: Sequence[str]) -> tuple[list[str], bool]:
    """The bridges that redirect, and whether the configuration of some is hidden."""
    bridges = sorted({bridge for gpu in gpus for bridge in system.bridges(gpu)})
    spaces = {bridge: system.read(str(Path("/sys/bus/pci/devices") / bridge / "config")) for bridge in bridges}
    redirected = [bridge for bridge, space in spaces.items() if (acs_control(space) or 0) & REDIRECTS]
    return redirected, any(len(space) < WHOLE for space in spaces.values())
