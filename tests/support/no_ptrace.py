"""A daemon that may look into no process, and an engine that is closed to it, as under Yama or in a container.

The kernel of a test may have no Yama. So the daemon goes without the rights that make root's looking possible, and the engine's
Python is a copy that may be run and not read: such a process is not dumpable (man 2 ptrace, man 5 proc).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE = 1, 2, 19


def closed_python(folder: Path) -> Path:
    """A Python that nobody may read, in this folder, which has the packages of none."""
    copy = folder / "python3"
    shutil.copyfile(Path(sys.executable).resolve(), copy)
    copy.chmod(0o111)
    return copy


def without_rights(begin: Callable[[], T]) -> T:
    """What `begin` returns, run by a thread without these rights; what it starts has them neither."""

    def run() -> T:
        for right in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE):
            if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, right, 0, 0, 0) != 0:
                raise PermissionError("only root can give rights up")
        return begin()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


if __name__ == "__main__":
    without_rights(lambda: os.execvp(sys.argv[1], sys.argv[1:]))  # noqa: S606
