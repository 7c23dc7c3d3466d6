"""The host's successful starts on disk, in `<state_dir>/history.json`.

To be wired so; none of it raises because of the disk:

    history = History(state_dir)          None for the folder: remembers as long as the daemon lives
    history.starts                        tuple[PastStart, ...], the newest last
    history.remember(PastStart(...))      takes hold at once, and is written beside the loop
    history.close()                       when the loop has ended; waits at most 2 s for what is being written
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import Final

import structlog

from mgpu_llm.core.history import PastStart, from_json, to_json, with_start

NAME: Final = "history.json"
#: Twenty starts are about ten KiB: what is longer than this is not ours.
MOST_BYTES: Final = 1 << 20
CLOSE_S: Final = 2.0

log = structlog.get_logger()


class History:
    """Made before the loop begins: it reads the file. One that is broken, or none of ours, is moved aside with a warning
    and the history is empty. The methods belong to one thread, the loop's."""

    def __init__(self, state_dir: Path | None) -> None:
        self._file = None if state_dir is None else state_dir / NAME
        self._one_at_a_time = threading.Lock()
        self._writers: list[threading.Thread] = []
        self._failed = False
        self.starts: tuple[PastStart, ...] = () if self._file is None else _read(self._file)

    def remember(self, start: PastStart) -> None:
        self.starts = with_start(self.starts, start)
        if self._file is None:
            return
        self._writers = [thread for thread in self._writers if thread.is_alive()]
        # A thread of our own, and none to wait for: a dead disk never answers.
        writer = threading.Thread(target=self._write, args=(self._file,), name="history", daemon=True)
        self._writers.append(writer)
        writer.start()

    def close(self, limit_s: float = CLOSE_S) -> None:
        for thread in self._writers[-1:]:  # the last one writes what there is by then
            thread.join(limit_s)

    def _write(self, file: Path) -> None:
        with self._one_at_a_time:
            try:
                _replace(file, to_json(self.starts).encode())
            except OSError as error:
                if not self._failed:
                    log.warning("history.failed", reason=f"cannot write '{file}': {_why(error)}")
                self._failed = True
            else:
                self._failed = False


def _read(file: Path) -> tuple[PastStart, ...]:
    try:
        return from_json(_text(file))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        broken = file.with_name(f"{file.name}.broken")
        why = _why(error) if isinstance(error, OSError) else str(error)
        try:
            file.rename(broken)
            log.warning("history.broken", reason=f"cannot use '{file}': {why}", moved_to=str(broken))
        except OSError as also:
            log.warning("history.broken", reason=f"cannot use '{file}': {why}; cannot move it aside: {_why(also)}")
        return ()


def _text(file: Path) -> str:
    """Raises ValueError for what is no plain, short file of UTF-8. Never waits: a FIFO would, for a writer."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        found = os.read(descriptor, MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(found) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 10} KiB")
    return found.decode()


def _replace(file: Path, text: bytes) -> None:
    """The whole new file or the whole old one, whoever dies meanwhile."""
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # of a daemon that was killed, or a link that leads elsewhere
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640)
        with os.fdopen(descriptor, "wb") as opened:
            os.fchmod(descriptor, 0o640)
            opened.write(text)
            opened.flush()
            os.fsync(descriptor)
        fresh.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
