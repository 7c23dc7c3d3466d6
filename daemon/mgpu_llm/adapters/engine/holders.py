"""Who it is that holds a GPU: processes by the pids that the driver names, which may be anybody's, or nobody's any more."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable

from mgpu_llm.adapters.engine.tree import PROC, read_stat
from mgpu_llm.core import launch

LONGEST_COMMAND = 120


def living(pids: Iterable[int]) -> dict[int, str]:
    """Those that live, each in words: "pid 71 (user alice, python train.py)". Where /proc hides others' processes it is only
    the pid. May wait on a process that is stuck."""
    return {pid: _words(pid) for pid in pids if _lives(pid)}


def _lives(pid: int) -> bool:
    stat = read_stat(pid)
    if stat is not None:
        return stat.alive
    try:
        os.close(os.pidfd_open(pid))  # asks the kernel, where /proc is mounted with hidepid
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _words(pid: int) -> str:
    told = [word for word in (_user(pid), _command(pid)) if word]
    return f"pid {pid} ({', '.join(told)})" if told else f"pid {pid}"


def _user(pid: int) -> str:
    try:
        uid = (PROC / str(pid)).stat().st_uid
    except OSError:
        return ""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _command(pid: int) -> str:
    """The command line without secrets, in one line; the name of a process that has none."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        words = []
    text = launch.shown(words) if any(words) else ""
    stat = read_stat(pid)
    text = text or (stat.name if stat is not None else "")
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= LONGEST_COMMAND else f"{text[:LONGEST_COMMAND]}..."
