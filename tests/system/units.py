"""The units of this checkout in a booted systemd, as the installer puts them there, with the programs of this checkout."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Final

from tests.support.booted_systemd import BootedSystemd
from tests.support.toy_setup import ROOT

PACKAGING: Final = ROOT / "packaging/systemd"
PROGRAMS: Final = ROOT / ".venv/bin"
LIMIT_S: Final = 120.0


def lay(booted: BootedSystemd) -> BootedSystemd:
    """The service, its template, its user and its folders."""
    unit = (PACKAGING / "mgpu-llm.service").read_text().replace("/usr/local/bin/", f"{PROGRAMS}/")
    script = str(PACKAGING / "instance.sed")
    template = subprocess.run(["sed", "-f", script], input=unit, capture_output=True, text=True, check=True).stdout
    for name, text in (("mgpu-llm", unit), ("mgpu-llm@", template)):
        booted.write(f"/etc/systemd/system/{name}.service", text)
        # A checkout below /tmp would be hidden by PrivateTmp.
        booted.write(f"/etc/systemd/system/{name}.service.d/checkout.conf", f"[Service]\nBindReadOnlyPaths={ROOT}\n")
    booted.write("/usr/local/lib/sysusers.d/mgpu-llm.conf", (PACKAGING / "mgpu-llm.sysusers").read_text())
    booted.write("/usr/local/lib/tmpfiles.d/mgpu-llm.conf", (PACKAGING / "mgpu-llm.tmpfiles").read_text())
    booted.must("systemd-sysusers")
    booted.must("systemd-tmpfiles", "--create", "mgpu-llm.conf")
    booted.must("systemctl", "daemon-reload")
    return booted


def ctl(booted: BootedSystemd, *words: str) -> str:
    """What mgpuctl says, which must succeed."""
    return booted.must(str(PROGRAMS / "mgpuctl"), *words)


def wait_for(what: Callable[[], bool]) -> None:
    """Until that holds; fails where it never does."""
    give_up_at = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < give_up_at, "it never came"
        time.sleep(0.1)
