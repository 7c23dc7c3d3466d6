"""The journal of the daemon's unit, read through journalctl: what was said since a moment, and what is being said."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from mgpu_llm.core import instances
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Failure
from mgpu_llm.ctl.words import Page, plain

JOURNALCTL: Final = "journalctl"
#: Where journald keeps what it has: on the disk, or until the next boot.
FOLDERS: Final = (Path("/var/log/journal"), Path("/run/log/journal"))
PROC: Final = Path("/proc")
ANSWER_S: Final = 5.0
INSTEAD: Final = (
    "mgpuctl logs without --follow, --since and --daemon has the engine's last lines, from the daemon itself"
)
#: As journalctl has them: errors, warnings, and what tells the story.
COLOURS: Final = {"0": "red", "1": "red", "2": "red", "3": "red", "4": "yellow"}


def unit_of(path: str) -> str:
    """The unit of the daemon that listens at `path`, by its cgroup; where none does, the one whose place that is. Raises Failure
    where that does not tell."""
    pid = _listener(path)
    if pid is not None:
        for part in reversed(_cgroup(pid).split("/")):
            if part.endswith(".service"):
                return part
        why = f"the daemon on {path} is no unit of systemd: its log lines go where its standard error goes"
        raise Failure(f"cannot read its journal: {why}; {INSTEAD}", exits.REFUSED)
    instance = instances.of_socket(Path(path))
    if path != str(instances.socket(instance)):
        why = f"no daemon answers on {path}, so nobody says which unit is meant"
        raise Failure(f"cannot read its journal: {why}; say it with --unit UNIT", exits.NO_DAEMON)
    return f"{instances.unit(instance)}.service"


def require_readable() -> None:
    """Raises Failure where journalctl would show nothing, or not everything, with what can be done about it."""
    kept = [folder for top in FOLDERS if top.is_dir() for folder in top.iterdir() if folder.is_dir()]
    if not kept or shutil.which(JOURNALCTL) is None:
        raise Failure(f"cannot read the journal: there is none on this host; {INSTEAD}", exits.REFUSED)
    if not any(os.access(folder / "system.journal", os.R_OK) for folder in kept):
        raise Failure(
            "not allowed to read the journal: use sudo, or join its group with: "
            f"usermod -aG systemd-journal USER (and log in again); {INSTEAD}",
            exits.NOT_ALLOWED,
        )


def entries(
    unit: str, matches: Sequence[str], *, since: str | None, count: int | None, follow: bool
) -> Iterator[dict[str, object]]:
    """The entries of the unit that have all fields of `matches` ("MGPU_RANK=1"), oldest first, the last `count` of them (None:
    all); with `follow` without end. Raises Failure with journalctl's own words."""
    argv = [JOURNALCTL, f"--unit={unit}", "--output=json", "--all", "--no-pager", "--quiet"]
    argv += ["--output-fields=MESSAGE,PRIORITY", f"--lines={'all' if count is None else count}"]
    argv += [f"--since={since}"] if since is not None else []
    argv += ["--follow"] if follow else []
    process = subprocess.Popen(
        [*argv, *matches], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            for line in process.stdout or ():
                yield dict(json.loads(line))
            said = process.stderr.read().strip() if process.stderr else ""
        finally:
            process.terminate()
    if process.returncode > 0:
        raise Failure(
            f"cannot read the journal: {plain(said) or 'journalctl failed and does not say why'}", exits.REFUSED
        )


def shown(entry: dict[str, object], page: Page) -> str:
    """The entry as journalctl shows it, without host and process: further lines stand below the first."""
    at = datetime.fromtimestamp(int(str(entry["__REALTIME_TIMESTAMP"])) / 1e6).astimezone()
    first, *more = [plain(line) for line in _text(entry.get("MESSAGE")).splitlines()] or [""]
    priority = str(entry.get("PRIORITY", "6"))
    indent = " " * len(stamp := f"{at:%b %d %H:%M:%S} ")
    said = page.shown("\n".join([first, *(f"{indent}{line}" for line in more)]))
    return stamp + page.paint(said, COLOURS.get(priority), bold=priority <= "5")


def _text(message: object) -> str:
    """What is not UTF-8, or cannot be printed, comes as a list of bytes."""
    if isinstance(message, list):
        return bytes(int(byte) for byte in message).decode("utf-8", "replace")
    return "" if message is None else str(message)


def _listener(path: str) -> int | None:
    """The process that listens there; None where none does, or it is nobody whom this process can see."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.settimeout(ANSWER_S)
        try:
            asked.connect(path)
            credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return None
    pid: int = struct.unpack("=iII", credentials)[0]
    return pid or None


def _cgroup(pid: int) -> str:
    try:
        lines = (PROC / f"{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    # "0::/system.slice/..."; where the old hierarchies are still in use, systemd's own is one of them.
    parts = [line.split(":", 2) for line in lines]
    return next((path for _, controllers, path in parts if controllers in ("", "name=systemd") and path != "/"), "")
