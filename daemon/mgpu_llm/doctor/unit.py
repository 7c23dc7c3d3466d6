"""What systemd gives the service: limits, environment and sandbox, under which the engine will run, and which are not our own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mgpu_llm.adapters.host.program import Unanswered, ask
from mgpu_llm.core.instances import USUAL
from mgpu_llm.doctor import sandbox
from mgpu_llm.doctor.sandbox import Sandbox

LIMIT_S: Final = 3.0
_ASKED: Final = (
    *("LoadState", "User", "Environment", "LimitMEMLOCK", "LimitNOFILE", "TasksMax", "MemoryMax"),
    *sandbox.PROPERTIES,
)
#: What systemd says for "no limit": the word, or the largest number there is.
_MOST: Final = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Unit:
    """`name` is how systemctl calls it. Limits are None where there is none; `memory_bytes` is that of the whole service."""

    user: str
    name: str = USUAL
    environment: Mapping[str, str] = field(default_factory=dict)
    memlock_bytes: int | None = None
    files: int | None = None
    tasks: int | None = None
    memory_bytes: int | None = None
    sandbox: Sandbox = field(default_factory=Sandbox)


def installed(name: str) -> Unit | None:
    """The unit of that name; None where it is not installed, or where no systemd answers. Blocks, three seconds at most."""
    asked = [f"--property={what}" for what in _ASKED]
    try:
        return parse(ask(["systemctl", "show", f"{name}.service", *asked], limit_s=LIMIT_S), name)
    except Unanswered:
        return None


def parse(text: str, name: str = USUAL) -> Unit | None:
    """From what `systemctl show` says; None where no such unit is loaded."""
    told = dict[str, str]()
    for line in text.splitlines():
        what, equals, value = line.partition("=")
        if equals:  # of mounts there is a line for each
            told[what] = f"{told[what]} {value}" if what in told else value
    if told.get("LoadState") != "loaded":
        return None
    try:
        words = shlex.split(told.get("Environment", ""))
    except ValueError:
        words = []
    return Unit(
        user=told.get("User") or "root",
        name=name,
        environment=dict(word.split("=", 1) for word in words if "=" in word),
        memlock_bytes=_limit(told.get("LimitMEMLOCK", "")),
        files=_limit(told.get("LimitNOFILE", "")),
        tasks=_limit(told.get("TasksMax", "")),
        memory_bytes=_limit(told.get("MemoryMax", "")),
        sandbox=sandbox.of_unit(told),
    )


def _limit(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) < _MOST else None
