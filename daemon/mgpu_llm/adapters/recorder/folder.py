"""The folder of recordings: their names, how many there are, and how they are packed. What has not a name of ours, or is
no plain file, is never touched."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

NAME: Final = re.compile(
    r"(?P<time>[12]\d{7}T\d{6}Z)-a\d+-[a-z0-9.-]+-(?P<outcome>[a-z]+)\.jsonl(?P<packed>\.gz)?", re.ASCII
)
TIME: Final = "%Y%m%dT%H%M%SZ"
UNFINISHED: Final = ".new"
RUNNING: Final = "running"
CUT: Final = "cut"
MODE: Final = 0o640
#: So much of an earlier life is packed before the first row of this one is taken: about a second's work. One recording is
#: no longer; what is too much stays plain, for the next life or until it has to go, and costs the new load no rows.
ADOPTED_BYTES: Final = 64 << 20
#: Above this size packing is to be quick rather than small: while it lasts, the rows of the next attempt wait.
BIG_BYTES: Final = 4 << 20
QUICK, SMALL = 1, 9


class Folder:
    """All methods raise OSError. At most one recording is open; it counts among the `keep` and the `max_bytes`."""

    def __init__(self, path: Path, *, keep: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._path = path
        self._keep = keep
        self._open: Path | None = None
        self._others_bytes = 0

    def adopt(self) -> None:
        """Finish what an earlier life left, and remove what is too much. What fails with one keeps from no other; the
        first error is raised at the end."""
        if not self._path.exists():
            return
        errors, left = list[OSError](), ADOPTED_BYTES
        for path in self._recordings(packed=False):
            try:
                size, ended = path.lstat().st_size, _ended(path, CUT)
                if size <= left:
                    left -= size
                    _pack(ended)
            except OSError as error:
                errors.append(error)
        for path in self._path.glob(f"*{UNFINISHED}"):
            if NAME.fullmatch(path.name.removesuffix(UNFINISHED)) and not stat.S_ISDIR(path.lstat().st_mode):
                path.unlink()
        self._make_room()
        if errors:
            raise errors[0]

    def open(self, now: datetime, what: str) -> int:
        """Open a new recording of `what` ("a3-p2p-off") for writing; its descriptor."""
        self._path.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._make_room(files=1)
        # Whatever the wall clock does, the newest has the last name: the first ones are the first to go.
        named = [(path.name, found) for path in self._path.iterdir() if (found := _time_of(path.name)) is not None]
        last, at = max(named, default=("", now))
        if _beginning(now, what) <= last:
            now = max(now, at) + timedelta(seconds=1)
        path = self._path / f"{_beginning(now, what)}{RUNNING}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
        self._open = path
        return descriptor

    @property
    def beginning(self) -> str:
        """How the name of the open recording begins, "" without one."""
        return "" if self._open is None else self._open.name.removesuffix(f"{RUNNING}.jsonl")

    def grown(self, size: int) -> None:
        """The open recording has this size now: older ones may have to go."""
        if self._others_bytes + size > self.max_bytes:
            self._make_room(files=1, size=size)

    def close(self, outcome: str, *, pack: bool) -> None:
        """The open recording is finished, and closed by who wrote it."""
        path, self._open = self._open, None
        if path is None:
            return
        ended = _ended(path, outcome)
        if pack:
            _pack(ended)
        self._make_room()

    def _make_room(self, *, files: int = 0, size: int = 0) -> None:
        """Remove the oldest until `files` more of `size` bytes fit."""
        sizes = {path: path.lstat().st_size for path in self._recordings()}
        for path in list(sizes):
            if len(sizes) + files <= self._keep and sum(sizes.values()) + size <= self.max_bytes:
                break
            path.unlink()
            del sizes[path]
        self._others_bytes = sum(sizes.values())

    def _recordings(self, *, packed: bool = True) -> list[Path]:
        """Oldest first and without the open one; only those not yet packed where `packed` is false."""
        return [
            path
            for path in sorted(self._path.iterdir())
            if _time_of(path.name) is not None and path != self._open
            if (packed or path.suffix != ".gz") and stat.S_ISREG(path.lstat().st_mode)
        ]


def _time_of(name: str) -> datetime | None:
    """When a recording of this name was begun; None for what is not ours."""
    found = NAME.fullmatch(name)
    try:
        return None if found is None else datetime.strptime(found["time"], TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def _beginning(now: datetime, what: str) -> str:
    return f"{now.strftime(TIME)}-{what}-"


def _ended(path: Path, outcome: str) -> Path:
    """The recording with its outcome in its name, unless it has one already."""
    return path.rename(path.with_name(path.name.replace(f"-{RUNNING}.jsonl", f"-{outcome}.jsonl")))


def _pack(path: Path) -> None:
    """Gzip a finished recording. Whoever dies meanwhile leaves the one file or the other."""
    final = path.with_name(f"{path.name}.gz")
    fresh = final.with_name(f"{final.name}{UNFINISHED}")
    fresh.unlink(missing_ok=True)  # of a daemon that was killed, or a link that leads elsewhere
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
        with path.open("rb") as plain, os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, MODE)
            level = QUICK if os.fstat(plain.fileno()).st_size > BIG_BYTES else SMALL
            with gzip.GzipFile("", "wb", level, fileobj=file) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(final)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    path.unlink()
