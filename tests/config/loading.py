"""Short ways from a text to a loaded config, to its problems as an operator reads them, and to a free port."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from mgpu_llm.config.checks import check
from mgpu_llm.config.files import Source
from mgpu_llm.config.parse import Loaded, parse
from mgpu_llm.config.problem import render
from mgpu_llm.config.schema import Config

MAIN = Path("a.toml")


def loaded(text: str, **drop_ins: str) -> Loaded:
    """The main file a.toml, then the drop-ins by name."""
    others = [Source(file=Path(f"{name}.toml"), text=drop_in) for name, drop_in in drop_ins.items()]
    return parse([Source(file=MAIN, text=text), *others], MAIN)


def problems(text: str, **drop_ins: str) -> list[str]:
    return render(loaded(text, **drop_ins).problems).splitlines()


def config(text: str) -> Config:
    result = loaded(text)
    assert result.problems == ()
    return result.config


def checked(
    text: str, environ: Mapping[str, str] | None = None, *, gpu_count: int | None = None, engine_runs: bool = True
) -> list[str]:
    """The problems with the host. The port is only tried with `engine_runs=False`."""
    found = check(loaded(text), environ or {}, gpu_count=gpu_count, engine_runs=engine_runs)
    return render(found).splitlines()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody had a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.bind((host, 0))
        return int(server.getsockname()[1])


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom file modes mean something, also where the tests run as root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)
