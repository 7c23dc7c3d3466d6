"""Several models on one host: each instance has a name, and by it a config, a unit, and folders of its own. "" is the usual one.

A template of systemd puts the name behind an @; so do the folders, which systemd then makes and removes without touching others'.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Final

CONFIGS: Final = PurePath("/etc/mgpu-llm")
USUAL: Final = "mgpu-llm"
RUNTIME: Final = PurePath("/run")
STATE: Final = PurePath("/var/lib")
SOCKET: Final = "control.sock"
#: Nothing that systemd would escape in a unit's name but the dash, which it leaves alone in %i.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
EXPECTED: Final = (
    "letters, digits, _, . and -, 64 at most, the first a letter or a digit, not conf, and not mgpu-llm..."
)


def is_name(name: str) -> bool:
    """Whether an instance can be called so. Copies of the usual one's file are none, and conf.d is its own."""
    return NAME.fullmatch(name) is not None and not name.startswith(USUAL) and name != "conf"


def of_config(file: PurePath) -> str:
    """Whose config an absolute path is: that of /etc/mgpu-llm/NAME.toml is NAME, any other the usual one's."""
    return file.stem if file.parent == CONFIGS and file.suffix == ".toml" and is_name(file.stem) else ""


def of_socket(path: PurePath) -> str:
    """Whose socket that is: that of /run/mgpu-llm@NAME is NAME, any other the usual one's."""
    name = path.parent.name.removeprefix(f"{USUAL}@")
    return name if path.parent.parent == RUNTIME and name != path.parent.name and is_name(name) else ""


def config_file(name: str) -> PurePath:
    return CONFIGS / f"{name or USUAL}.toml"


def runtime_dir(name: str) -> PurePath:
    return RUNTIME / _called(name)


def state_dir(name: str) -> PurePath:
    return STATE / _called(name)


def socket(name: str) -> PurePath:
    return runtime_dir(name) / SOCKET


def unit(name: str) -> str:
    """As systemctl and journalctl take it."""
    return _called(name)


def _called(name: str) -> str:
    return f"{USUAL}@{name}" if name else USUAL
