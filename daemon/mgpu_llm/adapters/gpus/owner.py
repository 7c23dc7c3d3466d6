"""Whose process it is that uses a GPU, as /proc tells. NVML names processes by their ids alone."""

from __future__ import annotations

import pwd
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """`user` is a name, or "uid 1234" where nobody has named it; `name` is the process's own, at most 15 characters."""

    user: str
    name: str


def owner(pid: int) -> Owner | None:
    """None where there is no such process to be seen: it has ended, or is hidden, or belongs to another container. Blocks where
    users are named by a directory service that does not answer; waits for no lock of the process."""
    try:
        lines = (PROC / f"{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    try:
        uid = int(told["Uid"].split()[0])
    except (KeyError, IndexError, ValueError):
        return None
    return Owner(user=_user(uid), name=told.get("Name", ""))


def command_line(pid: int) -> list[str]:
    """Its words, [] where they cannot be read. They lie in the process's memory: of one that is stuck in the driver, this may
    never return."""
    try:
        words = (PROC / f"{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return words.decode("utf-8", "replace").rstrip("\0").split("\0") if words.strip(b"\0") else []


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid {uid}"
