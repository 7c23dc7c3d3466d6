"""The evidence of failed attempts on disk: one folder each, named by its id, below `<state_dir>/incidents`.

All methods block for the disk and belong to threads other than the loop's. What has not the name of an incident is never touched.

Which is older is told by the time of `incident.json`, which each gets later than all before it: their names are of a clock that
may have been set back.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from mgpu_llm.core import incident

DOCUMENT: Final = "incident.json"
#: One incident has at most so many bytes.
MOST_BYTES: Final = 8 << 20
#: How the name of one that is not yet whole begins.
UNFINISHED: Final = ".new-"
#: So much later than the one before, where the clock says earlier; a disk may know whole seconds only.
LATER_NS: Final = 2 * 10**9

log = structlog.get_logger()


class NoIncidentError(Exception):
    """There is none that is meant; the text says which there are."""


class Incidents:
    """Keeps at most `keep` incidents, and `max_bytes` of them, in `folder`, the newest. Without a folder, or with keep = 0,
    there are none."""

    def __init__(self, folder: Path | None, *, keep: int, max_bytes: int) -> None:
        self.folder = folder if keep > 0 else None
        self.most_bytes = min(MOST_BYTES, max_bytes)
        self._keep = keep
        self._max_bytes = max_bytes
        self._one_at_a_time = threading.Lock()

    def adopt(self) -> None:
        """Remove what a killed daemon has left half done. Raises nothing."""
        with self._one_at_a_time:
            try:
                for path in self._entries(UNFINISHED):
                    shutil.rmtree(path)
                self._make_room(0, 0)
            except OSError as error:
                log.warning("incident.failed", reason=_why(error))

    def keep(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Write an incident: whole, or not at all, which is False and was said. Raises nothing."""
        folder = self.folder
        if folder is None:
            return False
        fresh = folder / f"{UNFINISHED}{name}"
        with self._one_at_a_time:
            try:
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
                self._make_room(1, sum(map(len, files.values())))
                fresh.mkdir(mode=0o750)
                for file, content in files.items():
                    _write(fresh / file, content)
                self._make_newest(fresh)
                fresh.rename(folder / name)
            except OSError as error:
                shutil.rmtree(fresh, ignore_errors=True)
                log.warning("incident.failed", incident=name, reason=_why(error))
                return False
        return True

    def listed(self) -> list[dict[str, Any]]:
        """What each says of itself in short, oldest first."""
        return [_summary(path) for path in self._entries()]

    def find(self, wanted: str) -> Path:
        """The incident of this id, of which a beginning is enough if it is the only one; "last" is the newest.

        Raises NoIncidentError."""
        paths = self._entries()
        found = paths[-1:] if wanted == "last" else [path for path in paths if path.name.startswith(wanted)]
        exact = [path for path in found if path.name == wanted]
        match exact or found:
            case [only]:
                return only
            case []:
                kept = f"there are {len(paths)}, the last is {paths[-1].name}" if paths else "none is kept"
                raise NoIncidentError(f"there is no incident {wanted!r}: {kept}")
            case several:
                raise NoIncidentError(f"{wanted!r} begins {len(several)} incidents, give more of it")

    def document(self, wanted: str) -> dict[str, Any]:
        """What incident.json says, and which files there are with their sizes. Raises NoIncidentError, OSError, ValueError."""
        path = self.find(wanted)
        told: dict[str, Any] = json.loads(_read(path / DOCUMENT))
        return {**told, "folder": str(path), "files": {file.name: file.lstat().st_size for file in _files(path)}}

    def archive(self, wanted: str) -> tuple[str, bytes]:
        """Its name, and all of it as one .tar.gz. Raises NoIncidentError, OSError."""
        path, left, packed = self.find(wanted), 2 * MOST_BYTES, io.BytesIO()
        # Without the time of the packing: the same incident is the same archive.
        with gzip.GzipFile("", "wb", 6, packed, 0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
            for file in _files(path):
                content = _read(file, left)
                left -= len(content)
                told = tarfile.TarInfo(f"{path.name}/{file.name}")
                told.size, told.mode, told.mtime = len(content), 0o640, int(file.lstat().st_mtime)
                archive.addfile(told, io.BytesIO(content))
        return path.name, packed.getvalue()

    def _make_room(self, count: int, size: int) -> None:
        """Remove the oldest until `count` more of `size` bytes fit."""
        sizes = {path: sum(file.lstat().st_size for file in _files(path)) for path in self._entries()}
        for path in list(sizes):
            if len(sizes) + count <= self._keep and sum(sizes.values()) + size <= self._max_bytes:
                break
            shutil.rmtree(path)
            del sizes[path]

    def _make_newest(self, fresh: Path) -> None:
        newest = max(map(_written_ns, self._entries()), default=0)
        if 0 < _written_ns(fresh) <= newest:
            os.utime(fresh / DOCUMENT, ns=(newest + LATER_NS, newest + LATER_NS))

    def _entries(self, beginning: str = "") -> list[Path]:
        """Folders with names of incidents, oldest first."""
        if self.folder is None or not self.folder.exists():
            return []
        found = (
            path
            for path in self.folder.iterdir()
            if path.name.startswith(beginning) and incident.ID.fullmatch(path.name.removeprefix(beginning))
            if stat.S_ISDIR(path.lstat().st_mode)
        )
        return sorted(found, key=lambda path: (_written_ns(path), path.name))


def _summary(path: Path) -> dict[str, Any]:
    short: dict[str, Any] = {"id": path.name}
    try:
        told = json.loads(_read(path / DOCUMENT))
        short |= {key: told[key] for key in incident.SHORT}
        short["bytes"] = sum(file.lstat().st_size for file in _files(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        short["unreadable"] = f"{type(error).__name__}: {error}"
    return short


def _written_ns(path: Path) -> int:
    """When it was written; 0 where that is not to be seen, as of one whose document is gone."""
    try:
        return (path / DOCUMENT).lstat().st_mtime_ns
    except OSError:
        return 0


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if stat.S_ISREG(file.lstat().st_mode))


def _read(path: Path, most: int = MOST_BYTES) -> bytes:
    """Never waits, as a FIFO would let us, and never leaves the folder by a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o640)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _why(error: OSError) -> str:
    where = f" '{error.filename}'" if error.filename else ""
    return f"cannot keep evidence{where}: {(error.strerror or str(error)).lower()}"
