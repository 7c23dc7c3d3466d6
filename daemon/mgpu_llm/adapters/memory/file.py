"""A small file of text that outlives the daemon, and whose disk may be full, read-only or dead: that costs the memory, and
one warning, never the service."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import structlog

#: What is longer than this is not ours: twenty remembered starts are about ten KiB.
MOST_BYTES: Final = 1 << 20
CLOSE_S: Final = 2.0
T = TypeVar("T")

log = structlog.get_logger()


class File:
    """`path` None: nothing is read or written. The methods belong to one thread, the loop's; the file is written by another."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._wanted: str | None = None
        self._due = False
        self._writer: threading.Thread | None = None
        self._failed = False

    def read(self, parse: Callable[[str], T]) -> T | None:
        """What `parse` makes of the text; None where there is no file. One that is broken, or none of ours, is moved aside with
        a warning, and is None as well. `parse` raises ValueError for such a text."""
        if self._path is None:
            return None
        try:
            return parse(_text(self._path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _move_aside(self._path, _why(error) if isinstance(error, OSError) else str(error))
            return None

    def keep(self, text: str | None) -> None:
        """Write it beside the loop, or remove the file (None). What comes while another is being written waits for that; of
        several that wait only the last is written."""
        if self._path is None:
            return
        with self._guard:
            self._wanted, self._due = text, True
            if self._writer is not None:
                return
            # A thread of our own, and none to wait for: a dead disk never answers.
            self._writer = threading.Thread(target=self._work, args=(self._path,), name="memory", daemon=True)
        try:
            self._writer.start()
        except RuntimeError as error:  # a pids limit that the engine fills
            self._writer = None
            self._warn(self._path, str(error))

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for what is being written, for so long at most."""
        with self._guard:
            writer = self._writer
        if writer is not None:
            writer.join(limit_s)

    def _work(self, path: Path) -> None:
        while True:
            with self._guard:
                if not self._due:
                    self._writer = None
                    return
                text, self._due = self._wanted, False
            try:
                if text is None:
                    path.unlink(missing_ok=True)
                else:
                    _replace(path, text.encode())
            except OSError as error:
                self._warn(path, _why(error))
            else:
                self._failed = False

    def _warn(self, path: Path, why: str) -> None:
        """Once, until it can be written again."""
        if not self._failed:
            log.warning("state.failed", reason=f"cannot write '{path}': {why}")
        self._failed = True


def _move_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.broken")
    try:
        path.rename(aside)
        log.warning("state.broken", reason=f"cannot use '{path}': {why}", moved_to=str(aside))
    except OSError as also:
        log.warning("state.broken", reason=f"cannot use '{path}': {why}; cannot move it aside: {_why(also)}")


def _text(path: Path) -> str:
    """Raises ValueError for what is no plain, short file of UTF-8. Never waits: a FIFO would, for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        found = os.read(descriptor, MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(found) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 10} KiB")
    return found.decode()


def _replace(path: Path, text: bytes) -> None:
    """The whole new file or the whole old one, whoever dies meanwhile."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # of a daemon that was killed, or a link that leads elsewhere
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640)
        with os.fdopen(descriptor, "wb") as opened:
            os.fchmod(descriptor, 0o640)
            opened.write(text)
            opened.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
