"""The mark by which an engine's processes are known as ours, carried in their environment."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from mgpu_llm.adapters.engine.tree import PROC, all_pids

VARIABLE = "MGPU_LLM_ENGINE"
SOCKETS = "VLLM_RPC_BASE_PATH"
#: setproctitle, with which vLLM names its processes, overwrites /proc/PID/environ unless this is set (1.3, measured).
KEEP_ENVIRON = "SPT_NOENV"


def prefix(runtime_dir: Path) -> str:
    """The same for every life of one daemon, another for every other daemon."""
    return hashlib.sha256(bytes(runtime_dir.resolve())).hexdigest()[:12] + ":"


def new(runtime_dir: Path, attempt: int) -> str:
    return f"{prefix(runtime_dir)}{attempt}:{secrets.token_hex(4)}"


def marked(env: Mapping[str, str], tag: str, sockets: Path | None) -> dict[str, str]:
    """The engine's environment with the mark, and with the folder for its sockets."""
    added = {VARIABLE: tag, KEEP_ENVIRON: "1"}
    if sockets is not None:
        added[SOCKETS] = str(sockets)
    return {**env, **added}


def is_marked(pid: int, tag: str) -> bool:
    """Whether a process carries `tag`, or a tag that begins so. One that wiped its environment counts as marked: ask
    only about processes that can be nobody else's. May wait on a process that is stuck."""
    environ = _environ(pid)
    return environ is not None and (not environ.strip(b"\0") or _has(environ, tag))


def find(beginning: str) -> frozenset[int]:
    """Processes of our user that carry a tag which begins so, without ourselves. May wait on a process that is stuck.

    A runtime folder of the same name in a container is another daemon's: its engines see another root than we do.
    """
    root = _root("self")
    environs = {pid: _environ(pid) for pid in all_pids() if pid != os.getpid() and _root(pid) == root}
    return frozenset(pid for pid, environ in environs.items() if environ is not None and _has(environ, beginning))


def _has(environ: bytes, beginning: str) -> bool:
    return b"\0" + f"{VARIABLE}={beginning}".encode() in b"\0" + environ


def _environ(pid: int) -> bytes | None:
    """None for a process that is gone or not of our user."""
    folder = PROC / str(pid)
    try:
        return (folder / "environ").read_bytes() if folder.stat().st_uid == os.getuid() else None
    except OSError:
        return None


def _root(pid: int | str) -> tuple[int, int] | None:
    """What a process takes for "/", by device and inode; None where it is gone or not to be looked at."""
    try:
        info = (PROC / str(pid) / "root").stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
