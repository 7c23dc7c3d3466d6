"""Commands to which a folder is read-only, as a unit with ProtectSystem=strict makes it: root too gets EROFS there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import pytest

_MOUNT: Final = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def inside(folder: Path, *command: str) -> list[str]:
    """The command, in mounts of its own, where nothing may be written in the folder."""
    own = ("-m",) if os.geteuid() == 0 else ("-m", "-r")
    return ["unshare", *own, "/bin/sh", "-c", _MOUNT, str(folder), *command]


@cache
def _possible() -> bool:
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(inside(Path(folder), "true"), capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not _possible(), reason="this user may make no mounts of its own (unshare -m)")
