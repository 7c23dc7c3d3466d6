"""What systemd gives the service: the limits and the environment under which the engine will run, which are not our own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mgpu_llm.adapters.host.program import Unanswered, ask

NAME: Final = "mgpu-llm.service"
LIMIT_S: Final = 3.0
_ASKED: Final = ("LoadState", "User", "Environment", "LimitMEMLOCK", "LimitNOFILE", "TasksMax", "MemoryMax")
#: What systemd says for "no limit": the word, or the largest number there is.
_MOST: Final = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Limits are None where there is none; `memory_bytes` is that of the whole service."""

    user: str
    environment: Mapping[str, str] = field(default_factory=dict)
    memlock_bytes: int | None = None
    files: int | None = None
    tasks: int | None = None
    memory_bytes: int | None = None


def installed() -> Unit | None:
    """The service's unit; None where it is not installed, or where no systemd answers. Blocks, three seconds at most."""
    try:
        return parse(ask(["systemctl", "show", NAME, *(f"--property={name}" for name in _ASKED)], limit_s=LIMIT_S))
    except Unanswered:
        return None


def parse(text: str) -> Unit | None:
    """From what `systemctl show` says; None where no such unit is loaded."""
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if told.get("LoadState") != "loaded":
        return None
    try:
        words = shlex.split(told.get("Environment", ""))
    except ValueError:
        words = []
    return Unit(
        user=told.get("User") or "root",
        environment=dict(word.split("=", 1) for word in words if "=" in word),
        memlock_bytes=_limit(told.get("LimitMEMLOCK", "")),
        files=_limit(told.get("LimitNOFILE", "")),
        tasks=_limit(told.get("TasksMax", "")),
        memory_bytes=_limit(told.get("MemoryMax", "")),
    )


def _limit(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) < _MOST else None
