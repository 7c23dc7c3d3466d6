"""One daemon a runtime folder: a lock that dies with its holder, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

NAME: Final = "mgpud.lock"


class HeldError(Exception):
    """Another process holds the lock; `pid` is what it wrote into it ("unknown" where it had no time to)."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


@contextmanager
def held(runtime_dir: Path) -> Iterator[None]:
    """Hold the folder's lock, making the folder if need be. Raises HeldError, or OSError where it cannot be used."""
    runtime_dir.mkdir(parents=True, exist_ok=True)
    with (runtime_dir / NAME).open("a+", encoding="ascii", errors="replace") as lock:
        _take(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def holder(runtime_dir: Path) -> str | None:
    """The pid of the daemon that holds the folder, None when nobody does or the folder cannot be looked into."""
    try:
        with (runtime_dir / NAME).open(encoding="ascii", errors="replace") as lock:
            _take(lock, fcntl.LOCK_SH)
    except HeldError as other:
        return other.pid
    except OSError:
        return None
    return None


def _take(lock: IO[str], kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise HeldError(lock.read().strip() or "unknown") from None
