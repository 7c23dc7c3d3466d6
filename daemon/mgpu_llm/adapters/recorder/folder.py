"""The folder of recordings: their names, how many there are, and how they are packed. What has not a name of ours, or is
no plain file, is never touched."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

NAME: Final = re.compile(r"\d{8}T\d{6}Z-a\d+-[a-z0-9.-]+-(?P<outcome>[a-z]+)\.jsonl(?P<packed>\.gz)?")
UNFINISHED: Final = ".new"
RUNNING: Final = "running"
CUT: Final = "cut"
MODE: Final = 0o640


class Folder:
    """All methods raise OSError. At most one recording is open; it counts among the `keep` and the `max_bytes`."""

    def __init__(self, path: Path, *, keep: int, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._path = path
        self._keep = keep
        self._open: Path | None = None
        self._others_bytes = 0

    def adopt(self) -> None:
        """Finish what an earlier life left, and remove what is too much."""
        if not self._path.exists():
            return
        for path in self._recordings(packed=False):
            _pack(_ended(path, CUT))
        for path in self._path.glob(f"*{UNFINISHED}"):
            if NAME.fullmatch(path.name.removesuffix(UNFINISHED)):
                path.unlink()
        self._make_room()

    def open(self, now: datetime, what: str) -> int:
        """Open a new recording of `what` ("a3-p2p-off") for writing; its descriptor."""
        self._path.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._make_room(files=1)
        taken = [path.name for path in self._path.iterdir()]
        # Not twice the same name, whatever the wall clock does.
        while any(name.startswith(_beginning(now, what)) for name in taken):
            now += timedelta(seconds=1)
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
            if (found := NAME.fullmatch(path.name)) is not None and path != self._open
            if (packed or not found["packed"]) and stat.S_ISREG(path.lstat().st_mode)
        ]


def _beginning(now: datetime, what: str) -> str:
    return f"{now:%Y%m%dT%H%M%SZ}-{what}-"


def _ended(path: Path, outcome: str) -> Path:
    """The recording with its outcome in its name, unless it has one already."""
    return path.rename(path.with_name(path.name.replace(f"-{RUNNING}.jsonl", f"-{outcome}.jsonl")))


def _pack(path: Path) -> None:
    """Gzip a finished recording. Whoever dies meanwhile leaves the one file or the other."""
    final = path.with_name(f"{path.name}.gz")
    fresh = final.with_name(f"{final.name}{UNFINISHED}")
    try:
        with path.open("rb") as plain, fresh.open("wb") as file:
            os.fchmod(file.fileno(), MODE)
            with gzip.GzipFile("", "wb", fileobj=file) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(final)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    path.unlink()
