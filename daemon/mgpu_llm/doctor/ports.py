"""Where the engine and the daemon want to listen, and who is there already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mgpu_llm.adapters import instance_lock
from mgpu_llm.config.endpoint import Listening
from mgpu_llm.config.listener import trouble
from mgpu_llm.core.redaction import argv
from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("ports")
_PID: Final = re.compile(r"\(pid (\d+)\)")
_LONGEST: Final = 100


def check(system: System, where: Listening, runtime_dir: Path, who: Account) -> Iterator[Finding]:
    """Connects to the engine's port: one second at most."""
    daemon = instance_lock.holder(runtime_dir)
    place = f"--uds {where.uds}" if where.uds else f"port {where.port} of {where.host}"
    why = trouble(where)
    if not why:
        yield SUBJECT.ok("ports-engine", f"{place} is free")
    elif daemon is not None:
        yield SUBJECT.ok("ports-engine", f"{place}: {why}, while mgpud (pid {daemon}) runs")
    else:
        yield _taken(system, place, why, own=where.uds is not None)
    if daemon is not None:
        yield SUBJECT.warning(
            "ports-control", f"mgpud (pid {daemon}) runs with {runtime_dir} already", "mgpuctl status"
        )
    elif finding := _folder(runtime_dir, who):
        yield finding


def _taken(system: System, place: str, why: str, *, own: bool) -> Finding:
    holder = _PID.search(why)
    seen, cure = f"{place}: {why}", "set another engine.port"
    if holder is not None:
        words = [word for word in system.text(f"/proc/{holder[1]}/cmdline").split("\0") if word]
        command = " ".join(argv(words))
        seen += f": {command[:_LONGEST]}" if command else ""
        cure = f"sudo kill {holder[1]}, or set another engine.port"
    elif "another process" in why:
        cure = f"sudo ss -ltnp tells who; {cure}"
    return SUBJECT.problem("ports-engine", seen, "another --uds in engine.args" if own else cure)


def _folder(runtime_dir: Path, who: Account) -> Finding | None:
    """The control socket's folder; systemd makes it for the service, as it does all below /run."""
    nearest = next(path for path in (runtime_dir, *runtime_dir.parents) if path.exists())
    may = account.access(who, [nearest])
    if may is None or (nearest != runtime_dir and runtime_dir.is_relative_to("/run")):
        return None
    if {"w", "x"} <= set(may[0]):
        return SUBJECT.ok("ports-control", f"{who.name} may make the control socket in {runtime_dir}")
    seen = f"{who.name} may not make the control socket in {runtime_dir}"
    return SUBJECT.problem(
        "ports-control", seen, f"sudo install -d -o {who.name} {runtime_dir}, or set daemon.runtime_dir"
    )
