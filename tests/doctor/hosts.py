"""Hosts made of the files that a kernel would show, below a folder."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from mgpu_llm.doctor.finding import Finding
from mgpu_llm.doctor.system import System

PROPRIETARY = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 04:49:49 UTC 2024
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs@U22)  Wed Feb 26 01:58:44 UTC 2025
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
MODULES = """\
nvidia_uvm 4943872 2 - Live 0x0000000000000000 (POE)
nvidia 56717312 21 nvidia_uvm, Live 0x0000000000000000 (POE)
ahci 49152 3 - Live 0x0000000000000000
"""
NOUVEAU = """\
nouveau 2736128 4 - Live 0x0000000000000000
ahci 49152 3 - Live 0x0000000000000000
"""
BARE_METAL = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme de pse tsc msr svm\n"
VIRTUAL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme de pse tsc msr hypervisor lahf_lm\n"
GPU, SWITCH = "0x030200\n", "0x068000\n"


class Host:
    """The host's files, written one by one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.system = System(root)

    def has(self, name: str, content: str | bytes = "") -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def has_gpu(
        self, address: str = "0000:41:00.0", *, kind: str = GPU, group: str = "", bridge: bytes | None = None
    ) -> None:
        """One of NVIDIA's PCI devices, below a root port of its own whose configuration is `bridge`; `group` is the type of its
        IOMMU group."""
        port = f"/sys/devices/pci0000:40/0000:40:{int(address[5:7], 16) % 32:02x}.1"
        device = f"{port}/{address}"
        self.has(f"{device}/vendor", "0x10de\n")
        self.has(f"{device}/class", kind)
        if group:
            self.has(f"{device}/iommu_group/type", f"{group}\n")
        if bridge is not None:
            self.has(f"{port}/config", bridge)
        devices = self.root / "sys/bus/pci/devices"
        devices.mkdir(parents=True, exist_ok=True)
        for path in (device, port):
            if not (link := devices / Path(path).name).is_symlink():
                link.symlink_to(self.root / path.lstrip("/"))


def bridge_config(acs_control: int) -> bytes:
    """All of a bridge's configuration space, with error reporting (1) before access control (0x0d), as real ports have it."""
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
    struct.pack_into("<IHH", space, 0x148, 0x000D | 1 << 16, 0x001F, acs_control)
    return bytes(space)


def levels(findings: Sequence[Finding]) -> dict[str, str]:
    """The level of each check, where it was told once."""
    told: dict[str, str] = {finding.name: finding.level for finding in findings}
    assert len(told) == len(findings), f"several of one name: {[finding.name for finding in findings]}"
    return told


def named(findings: Sequence[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found
