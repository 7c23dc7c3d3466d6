"""What stands between GPUs, from the files that a host shows."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mgpu_llm.doctor import links
from mgpu_llm.doctor.links import Pair
from tests.doctor.hosts import BARE_METAL, VIRTUAL, Host, bridge_config, levels, named

OVER_PCI = [Pair(one=0, other=1, how="pcie")]
OVER_NVLINK = [Pair(one=0, other=1, how="nvlink")]
#: ACS control: source validation, request and completion redirect, upstream forwarding, as the kernel sets them for isolation.
ISOLATED, OPEN = 0x1D, 0x00


def bare_metal(folder: Path, *, group: str, acs: int, cmdline: str = "ro quiet\n") -> Host:
    host = Host(folder)
    host.has("/proc/cpuinfo", BARE_METAL)
    host.has("/proc/cmdline", f"BOOT_IMAGE=/vmlinuz {cmdline}")
    host.has("/sys/class/dmi/id/sys_vendor", "Supermicro\n")
    if group:
        host.has("/sys/class/iommu/ivhd0/uevent")
    for address in ("0000:41:00.0", "0000:61:00.0"):
        host.has_gpu(address, group=group, bridge=bridge_config(acs))
    return host


def test_an_iommu_that_translates_and_bridges_that_redirect_are_why_peer_to_peer_hangs(tmp_path: Path) -> None:
    host = bare_metal(tmp_path, group="DMA-FQ", acs=ISOLATED, cmdline="ro amd_iommu=on\n")
    found = list(links.check(host.system, OVER_PCI))
    assert levels(found) == {"links-p2p": "ok", "links-iommu": "warning", "links-acs": "problem"}
    iommu, acs = named(found, "links-iommu"), named(found, "links-acs")
    assert "for 2 GPUs (0000:41:00.0, 0000:61:00.0; kernel: amd_iommu=on)" in iommu.seen
    assert "iommu=pt" in iommu.fix
    assert "NCCL_P2P_DISABLE" in iommu.fix
    assert "sudo setpci -s 0000:40:01.1 ECAP_ACS+0x6.w=0000" in acs.fix


def test_an_iommu_that_passes_through_and_bridges_that_do_not_redirect_are_well(tmp_path: Path) -> None:
    host = bare_metal(tmp_path, group="identity", acs=OPEN, cmdline="iommu=pt\n")
    found = list(links.check(host.system, OVER_PCI))
    assert levels(found) == {"links-p2p": "ok", "links-iommu": "ok", "links-acs": "ok"}
    assert "kernel: iommu=pt" in named(found, "links-iommu").seen


def test_bridges_that_redirect_without_an_iommu_are_slow_only(tmp_path: Path) -> None:
    found = list(links.check(bare_metal(tmp_path, group="", acs=ISOLATED).system, OVER_PCI))
    assert levels(found) == {"links-p2p": "ok", "links-iommu": "ok", "links-acs": "warning"}


def test_nvlink_passes_neither_iommu_nor_bridges(tmp_path: Path) -> None:
    host = bare_metal(tmp_path, group="DMA", acs=ISOLATED)
    assert set(levels(list(links.check(host.system, OVER_NVLINK))).values()) == {"ok"}


def test_who_is_not_root_sees_no_access_control_and_is_told_so(tmp_path: Path) -> None:
    host = bare_metal(tmp_path, group="identity", acs=OPEN)
    host.has("/sys/bus/pci/devices/0000:40:01.1/config", bridge_config(OPEN)[:64])
    assert named(list(links.check(host.system, OVER_PCI)), "links-acs").level == "unknown"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("/proc/cpuinfo", VIRTUAL),
        ("/sys/hypervisor/type", "xen\n"),
        ("/sys/class/dmi/id/sys_vendor", "QEMU\n"),
        ("/sys/class/dmi/id/product_name", "VMware Virtual Platform\n"),
    ],
)
def test_a_virtual_machine_is_known_by_any_of_its_marks(tmp_path: Path, file: str, content: str) -> None:
    host = Host(tmp_path)
    assert links.virtual_machine(host.system) == ""
    host.has(file, content)
    assert links.virtual_machine(host.system)
    assert levels(list(links.check(host.system, OVER_PCI))) == {"links-p2p": "ok", "links-virtual": "warning"}
    assert levels(list(links.check(host.system, OVER_NVLINK))) == {"links-p2p": "ok", "links-virtual": "ok"}


def test_one_gpu_has_no_links(tmp_path: Path) -> None:
    assert list(links.check(Host(tmp_path).system, [])) == []


def test_pairs_are_told_by_how_they_reach_each_other() -> None:
    mixed = [
        Pair(one=0, other=1, how="nvlink"),
        Pair(one=0, other=2, how="pcie"),
        Pair(one=1, other=2, how="none", why="chipset not supported"),
    ]
    (told,) = links.pairs(mixed)
    assert told.seen == (
        "pairs by what the driver says: 1 over NVLink (0-1), 1 over PCI Express (0-2), "
        "1 not at all (1-2: chipset not supported); those without go through host memory, which is slower but works"
    )
    (unknown,) = links.pairs([Pair(one=0, other=1, how="unknown")])
    assert unknown.level == "unknown"


def test_a_configuration_space_without_access_control_or_with_a_loop_has_no_register() -> None:
    assert links.acs_control(bytes(4096)) is None
    assert links.acs_control(bridge_config(ISOLATED)[:64]) is None
    loop = bytearray(4096)
    struct.pack_into("<I", loop, 0x100, 0x0001 | 1 << 16 | 0x100 << 20)
    assert links.acs_control(bytes(loop)) is None
    assert links.acs_control(bridge_config(ISOLATED)) == ISOLATED
