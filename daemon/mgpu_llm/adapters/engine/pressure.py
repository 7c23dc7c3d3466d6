"""How long everybody waited for memory or storage: Linux's pressure stall information (PSI, Linux 4.20).

The "full" line of Documentation/accounting/psi.rst: the share of time in which no task could go on for want of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

HOST: Final = Path("/proc/pressure")
_FULL: Final = re.compile(rb"^full avg10=([0-9.]+)", re.MULTILINE)


class Pressure(NamedTuple):
    """In percent of the last ten seconds; None where nobody tells."""

    memory_percent: float | None
    storage_percent: float | None


def read(cgroup: Path | None, host: Path = HOST) -> Pressure:
    """Of the cgroup (version 2) where it tells, else of the host. Never waits on a process."""
    return Pressure(*(_read(cgroup, host, name) for name in ("memory", "io")))


def _read(cgroup: Path | None, host: Path, name: str) -> float | None:
    places = [host / name] if cgroup is None else [cgroup / f"{name}.pressure", host / name]
    for place in places:
        try:
            found = _FULL.search(place.read_bytes())
        except OSError:  # PSI may be switched off (psi=0, cgroup.pressure), and reading then fails
            continue
        if found is not None:
            return float(found[1])
    return None
