"""mgpuctl alone: every instance of this host, those that run and those that have a config."""

from __future__ import annotations

from pathlib import Path, PurePath

from mgpu_llm.core import instances
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.words import Page, columns, plain

HEAD = ("INSTANCE", "STATE", "RUNG", "MODEL", "URL")
UNANSWERED = {exits.NO_DAEMON: "not running", exits.NOT_ALLOWED: "not allowed to ask (sudo, or its group)"}


def names() -> list[str]:
    """Those whose daemon has a socket, or for which there is a config; "" is the usual one, and comes first."""
    sockets = [
        instances.of_socket(path) for path in _those(instances.RUNTIME, f"{instances.USUAL}*/{instances.SOCKET}")
    ]
    configs = [instances.of_config(path) for path in _those(instances.CONFIGS, "*.toml")]
    return sorted({*sockets, *configs})


def overview_lines(found: list[str], page: Page) -> list[str]:
    """A table of these instances, and what to ask for more."""
    rows = [HEAD, *(_row(name) for name in found)]
    named = next((name for name in found if name), "")
    more = [f"mgpuctl -i {named} status"] if named else []
    return [
        *(page.shown(line) for line in columns(rows)),
        "",
        *(f"  {line}" for line in ("mgpuctl status", *more, "mgpuctl --help")),
    ]


def _row(name: str) -> tuple[str, ...]:
    client = Client(str(instances.socket(name)))
    try:
        status = client.status()
    except Failure as failure:
        return client.unit, UNANSWERED.get(failure.code, "no answer"), "", "", ""
    state = f"{status.state}, degraded" if status.degraded else status.state
    return client.unit, state, plain(status.rung), plain(status.model), plain(status.url)


def _those(folder: PurePath, pattern: str) -> list[Path]:
    """None where the folder is not there, or may not be looked into."""
    try:
        return sorted(Path(folder).glob(pattern))
    except OSError:
        return []
