"""The Fabric Manager, without which the GPUs behind an NVSwitch do not start: CUDA's error 802."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from mgpu_llm.adapters.host.program import Unanswered, ask
from mgpu_llm.doctor.finding import Finding, Subject
from mgpu_llm.doctor.system import OTHER_BRIDGE, System

SUBJECT: Final = Subject("fabric")
LIMIT_S: Final = 3.0
UNIT: Final = "nvidia-fabricmanager"
_VERSION: Final = re.compile(r"(\d+\.\d+(?:\.\d+)?)")


def program(argv: Sequence[str]) -> str:
    """Raises Unanswered."""
    return ask(argv, limit_s=LIMIT_S)


def check(system: System, driver: str, run: Callable[[Sequence[str]], str] = program) -> Iterator[Finding]:
    """`driver` is its version. Says nothing where there is no NVSwitch."""
    switches = [name for name in system.names("/dev") if name.removeprefix("nvidia-nvswitch").isdecimal()]
    switches = switches or system.nvidia_devices(OTHER_BRIDGE)
    if not switches:
        return
    there = f"NVSwitches: {len(switches)}"
    if system.in_container():
        yield SUBJECT.unknown("fabric-manager", f"{there}, and the Fabric Manager runs outside of this container")
        return
    try:
        state = run(["systemctl", "show", UNIT, "--property=ActiveState", "--value"]).strip()
    except Unanswered as silence:
        yield SUBJECT.unknown("fabric-manager", f"{there}; {silence}")
        return
    if state == "active":
        yield SUBJECT.ok("fabric-manager", f"{there}, and {UNIT} is active")
    else:
        seen = f"{there}, and {UNIT} is {state or 'not there'}: CUDA will say error 802, system not yet initialized"
        cure = f"sudo systemctl enable --now {UNIT}; where there is none, install it in the driver's version {driver}"
        yield SUBJECT.problem("fabric-manager", seen, cure)
    yield _version(driver, run)


def _version(driver: str, run: Callable[[Sequence[str]], str]) -> Finding:
    try:
        found = _VERSION.search(run(["nv-fabricmanager", "--version"]))
    except Unanswered as silence:
        return SUBJECT.unknown("fabric-version", f"{silence}")
    if found is None or not driver:
        return SUBJECT.unknown("fabric-version", "the Fabric Manager or the driver does not tell its version")
    if found[1] == driver:
        return SUBJECT.ok("fabric-version", f"the Fabric Manager is of the driver's version {driver}")
    seen = f"the Fabric Manager is {found[1]}, the driver {driver}: it refuses to run on another version than its own"
    return SUBJECT.problem("fabric-version", seen, f"install {UNIT} {driver}, then sudo systemctl restart {UNIT}")
