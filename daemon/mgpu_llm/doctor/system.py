"""The host's own files, below a root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

MOST_BYTES: Final = 1 << 20
NVIDIA: Final = "0x10de"
#: PCI base class "display controller", and the class of an NVSwitch, "other bridge" (pci_ids.h of the kernel).
DISPLAY: Final = "0x03"
OTHER_BRIDGE: Final = "0x0680"
NO_LIMIT: Final = 1 << 62
#: What stands at a container's root (Docker, Podman), and what systemd names the manager in.
CONTAINERS: Final = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")


class System:
    """Reads nothing outside of `root`; what is missing, or not to be read, is empty."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """Whole, up to a mebibyte."""
        return self.read(name).decode("utf-8", "replace")

    def read(self, name: str) -> bytes:
        try:
            with self.path(name).open("rb") as file:
                return file.read(MOST_BYTES)
        except OSError:
            return b""

    def names(self, folder: str) -> list[str]:
        """What is in a folder, in order."""
        try:
            return sorted(entry.name for entry in self.path(folder).iterdir())
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        try:
            return self.path(name).exists()
        except OSError:
            return False

    def nvidia_devices(self, kind: str) -> list[str]:
        """The PCI addresses of NVIDIA's devices whose class begins so."""
        return [address for address in self.names("/sys/bus/pci/devices") if self._is_nvidias(address, kind)]

    def in_container(self) -> bool:
        return any(self.exists(name) for name in CONTAINERS)

    def group_limit(self, controller: str, file: str, old_file: str) -> int | None:
        """The least limit of the control groups that we are in; None where there is none. `old_file` is what the first version of
        control groups calls it."""
        limits = list[int]()
        for line in self.text("/proc/self/cgroup").splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if controllers not in ("", controller):
                continue
            top, name = (f"/sys/fs/cgroup/{controller}", old_file) if controllers else ("/sys/fs/cgroup", file)
            parts = [part for part in path.split("/") if part]
            values = (self.text("/".join([top, *parts[:depth], name])).strip() for depth in range(len(parts) + 1))
            limits += [int(value) for value in values if value.isdecimal()]
        # The first version says "no limit" with the largest number of whole pages.
        return min((limit for limit in limits if limit < NO_LIMIT), default=None)

    def bridges(self, address: str) -> Iterator[str]:
        """The PCI addresses of what is between a device and the processor, from the root port down."""
        try:
            way = self.path(f"/sys/bus/pci/devices/{address}").resolve().parts
        except OSError:
            return
        yield from (part for part in way[:-1] if part.count(":") == 2)

    def _is_nvidias(self, address: str, kind: str) -> bool:
        device = f"/sys/bus/pci/devices/{address}"
        return self.text(f"{device}/vendor").strip() == NVIDIA and self.text(f"{device}/class").startswith(kind)
