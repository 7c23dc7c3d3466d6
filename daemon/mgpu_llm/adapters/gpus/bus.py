"""Where the kernel says that the GPUs are: it answers also for one that the driver has lost, and asks nobody for that."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

#: What the driver "nvidia" holds, a link for each (drivers/nvidia-nvswitch has the switches).
DEVICES: Final = Path("/sys/bus/pci/drivers/nvidia")
_ADDRESS: Final = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


def address(index: int, count: int, devices: Path) -> str | None:
    """The PCI address of GPU `index` as NVML writes it, "00000000:3B:00.0". None where the kernel does not list `count` of
    them: then nobody knows which is which, while else NVML counts them in the order of their addresses."""
    try:
        names = os.listdir(devices)  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return None
    found = sorted((match[1].rjust(8, "0"), match[2]) for name in names if (match := _ADDRESS.fullmatch(name)))
    return ":".join(found[index]).upper() if len(found) == count else None
