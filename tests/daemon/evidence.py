"""Incidents as tests look for them, and an engine that gives its secrets away."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.daemon.lives import Life
from tests.support.fake_engine import COMMAND

#: Where it is planted, and what: each is to be found nowhere in an incident.
PLANTED: Final[Mapping[str, str]] = {
    "variable of the engine": "planted-in-the-variable",
    "variable of the daemon": "planted-in-the-daemon",
    "argument": "planted-in-the-argument",
    "password of a proxy": "planted-for-the-proxy",
    "hub token in a line": "hf_plantedInALineOfTheLog",
    "key in a line": "sk-planted-in-a-line-of-the-log",
    "header in a line": "planted.bearer.of.a.line",
    "URL in a line": "planted-in-a-url",
    "arguments in a line": "planted-in-non-default-args",
    "argument of a child": "planted-in-a-child",
}
FILES: Final = {"incident.json", "engine.log", "stacks.txt", "processes.json", "kernel.log", "host.json"}


def careless_engine(folder: Path) -> list[str]:
    """The fake engine, after it has printed secrets, and with a child that carries one in its command line."""
    folder.mkdir(exist_ok=True)
    script = folder / "engine.sh"
    script.write_text(
        "#!/bin/sh\n"
        f"echo 'trying {PLANTED['hub token in a line']} and {PLANTED['key in a line']}'\n"
        f"echo '(APIServer pid=7) INFO 11-22 10:00:00 [a.py:1] Authorization: Bearer {PLANTED['header in a line']}'\n"
        f"echo 'GET https://me:{PLANTED['URL in a line']}@example.org/model'\n"
        f"echo \"non-default args: {{'api_key': ['{PLANTED['arguments in a line']}'], 'port': 1}}\"\n"
        'echo "HF_TOKEN is $HF_TOKEN, proxy $https_proxy, daemon $OUR_SECRET, all: $*"\n'
        f"python3 -c 'import time; time.sleep(600)' --api-key '{PLANTED['argument of a child']}' &\n"
        '[ -n "$NCCL_DEBUG_FILE" ] && echo "NCCL INFO of $HF_TOKEN" >"$(dirname "$NCCL_DEBUG_FILE")/nccl.host.71"\n'
        f'exec {" ".join(COMMAND)} "$@"\n'
    )
    script.chmod(0o755)
    return [str(script), "serve"]


def careless_settings(folder: Path) -> dict[str, object]:
    return {
        "engine.command": careless_engine(folder),
        "engine.args": ["--api-key", PLANTED["argument"]],
        "engine.env.HF_TOKEN": PLANTED["variable of the engine"],
    }


def careless_environment() -> dict[str, str]:
    proxy = f"http://me:{PLANTED['password of a proxy']}@127.0.0.1:9/"
    return {"OUR_SECRET": PLANTED["variable of the daemon"], "https_proxy": proxy, "no_proxy": "127.0.0.1,localhost"}


def folder_of(life: Life) -> Path:
    return life.setup.state_dir / "incidents"


def incidents(life: Life) -> list[Path]:
    """The incidents on disk, oldest first, and whatever else is among them."""
    folder = folder_of(life)
    return sorted(folder.iterdir()) if folder.exists() else []


def told(incident: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((incident / "incident.json").read_text())
    return document


def unpacked(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        members = [member for member in opened.getmembers() if member.isreg()]
        return {member.name: opened.extractfile(member).read() for member in members}  # type: ignore[union-attr]
