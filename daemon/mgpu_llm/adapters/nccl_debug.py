"""NCCL's own words in files of their own, so that the engine's output stays readable.

NCCL prints nothing unless NCCL_DEBUG asks for it. Once an attempt has failed, the next one is asked: what it says of transports
and channels is the best evidence there is of a stall between GPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: The end of each is kept: what NCCL did last stands there.
MOST_FILES: Final = 16
MOST_BYTES: Final = 128 << 10


def asked_for(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The environment with NCCL told to write into `folder`, which is emptied; unchanged where the admin has asked NCCL for
    anything himself, or where the folder cannot be made."""
    if "NCCL_DEBUG" in environment or "NCCL_DEBUG_FILE" in environment:
        return dict(environment)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o750, exist_ok=True)
    except OSError:
        return dict(environment)
    return {**environment, "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(folder / "nccl.%h.%p")}


def read(environment: Mapping[str, str]) -> dict[str, str]:
    """The files that engines of this environment have written, by name, the newest first. Blocks."""
    pattern = Path(environment.get("NCCL_DEBUG_FILE", ""))
    if not pattern.is_absolute():
        return {}
    found = dict[str, str]()
    with contextlib.suppress(OSError):
        files = pattern.parent.glob(re.sub(r"%[hp]", "*", pattern.name))
        plain = sorted((path for path in files if path.is_file()), key=lambda path: -path.stat().st_mtime)
        for path in plain[:MOST_FILES]:
            with contextlib.suppress(OSError):
                found[re.sub(r"[^\w.-]", "_", path.name)] = _end(path)
    return found


def _end(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - MOST_BYTES))
        return file.read(MOST_BYTES).decode("utf-8", "replace")
