"""The NVIDIA driver: the kernel's module, the libraries beside it, and whether they are of one version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from mgpu_llm.doctor.finding import Finding, Subject, listed
from mgpu_llm.doctor.system import DISPLAY, System

SUBJECT: Final = Subject("driver")
#: Where distributions, NVIDIA's own installer, its container runtime and WSL put the driver's libraries.
LIBRARIES: Final = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
)
_MODULE: Final = re.compile(r"^NVRM version: NVIDIA UNIX (.*?Kernel Module.*?)\s{2,}(\d+(?:\.\d+)+)\s", re.MULTILINE)
_FILE: Final = re.compile(r"libnvidia-ml\.so\.(\d+\.\d+(?:\.\d+)?)")
CUDA: Final = "libcuda.so.1"
_INSTALL: Final = (
    "install the NVIDIA driver for this kernel, then reboot "
    "(Debian: apt install nvidia-driver; Ubuntu: ubuntu-drivers install --gpgpu)"
)
_NOUVEAU: Final = (
    "printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' | sudo tee /etc/modprobe.d/no-nouveau.conf; "
    "sudo update-initramfs -u (or dracut -f). Then install the NVIDIA driver, and reboot"
)
_RELOAD: Final = (
    "reboot, or with nothing on the GPUs: "
    "sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia; sudo modprobe nvidia-uvm"
)


@dataclass(frozen=True, kw_only=True)
class Module:
    """The loaded kernel module. `open_source`: NVIDIA's open one."""

    version: str
    open_source: bool


def module(text: str) -> Module | None:
    """From /proc/driver/nvidia/version."""
    if (found := _MODULE.search(text)) is None:
        return None
    return Module(version=found[2], open_source=found[1].startswith("Open"))


def library_versions(system: System) -> list[str]:
    """Of the libnvidia-ml files of this host, as their names tell."""
    names = (name for folder in LIBRARIES for name in system.names(folder))
    return sorted({found[1] for name in names if (found := _FILE.fullmatch(name))})


def check(system: System, *, wanted: bool, told: str = "", silence: str = "") -> Iterator[Finding]:
    """`wanted`: whether the config uses GPUs; `told` is the driver's version by NVML, and where that does not answer, "" and
    `silence` says why."""
    loaded, version = system.text("/proc/modules"), module(system.text("/proc/driver/nvidia/version"))
    if version is None and told:
        yield SUBJECT.ok("driver-module", f"driver {told}, by NVML; /proc/driver/nvidia cannot be seen here")
    elif version is None:
        yield _absent(system, loaded, wanted, f" ({silence.partition('; ')[0]})" if silence else "")
        return
    else:
        kind = "open" if version.open_source else "proprietary"
        yield SUBJECT.ok("driver-module", f"{kind} kernel module {version.version}{_firmware(system)}")
        yield from _library(version, library_versions(system))
        yield from _cuda_library(system)
    if re.search(r"^nouveau ", loaded, re.MULTILINE):
        yield SUBJECT.warning(
            "driver-nouveau", "nouveau is loaded beside NVIDIA's module, and may hold a GPU", _NOUVEAU
        )


def _absent(system: System, loaded: str, wanted: bool, silence: str) -> Finding:
    if not wanted:
        return SUBJECT.ok("driver-module", 'no NVIDIA driver, and gpus.use = "none" wants none')
    if re.search(r"^nouveau ", loaded, re.MULTILINE):
        return SUBJECT.problem("driver-module", "no NVIDIA driver: nouveau has the GPUs, and knows no CUDA", _NOUVEAU)
    present = system.nvidia_devices(DISPLAY)
    if system.in_container():
        seen = f"no NVIDIA driver in this container{silence}"
        return SUBJECT.problem("driver-module", seen, "docker run --gpus all (with the NVIDIA Container Toolkit)")
    if present:
        seen = f"no NVIDIA driver is loaded, for {len(present)} NVIDIA GPUs on the PCI bus ({listed(present)})"
        return SUBJECT.problem("driver-module", seen, f"sudo modprobe nvidia-uvm; where there is none: {_INSTALL}")
    seen = f"no NVIDIA driver, and no NVIDIA GPU on the PCI bus{silence}"
    return SUBJECT.problem("driver-module", seen, f'{_INSTALL}; for an engine without GPUs write gpus.use = "none"')


def _library(loaded: Module, versions: list[str]) -> Iterator[Finding]:
    if not versions:
        why = f"no libnvidia-ml.so.* in {listed(list(LIBRARIES), 6)}"
        yield SUBJECT.unknown("driver-library", why)
    elif loaded.version in versions:
        more = f" (and {listed([other for other in versions if other != loaded.version])})" if versions[1:] else ""
        yield SUBJECT.ok("driver-library", f"libnvidia-ml is of the module's version {loaded.version}{more}")
    else:
        seen = (
            f"libnvidia-ml is {listed(versions)}, the loaded module {loaded.version}: the driver was replaced while in use, "
            "and CUDA fails until both are the same"
        )
        yield SUBJECT.problem("driver-library", seen, _RELOAD)


def _cuda_library(system: System) -> Iterator[Finding]:
    """A driver's library without the other: so looks a container that was given "utility" and not "compute"."""
    folders = [folder for folder in LIBRARIES if any(_FILE.fullmatch(name) for name in system.names(folder))]
    if folders and not any(CUDA in system.names(folder) for folder in LIBRARIES):
        seen = f"no {CUDA} beside libnvidia-ml in {listed(folders)}: CUDA does not start without"
        inside = "docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        outside = "install the driver's CUDA library (Debian: libcuda1; Ubuntu: libnvidia-compute-*)"
        yield SUBJECT.problem("driver-cuda-library", seen, inside if system.in_container() else outside)


def _firmware(system: System) -> str:
    """Whether the GPU's own processor (GSP) runs the driver, as /proc/driver/nvidia/gpus/*/information tells from 510 on."""
    for gpu in system.names("/proc/driver/nvidia/gpus"):
        for line in system.text(f"/proc/driver/nvidia/gpus/{gpu}/information").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "GPU Firmware":
                return ", without GSP firmware" if value.strip() == "N/A" else f", GSP firmware {value.strip()}"
    return ""
