"""The recorder's thread's side: the one recording that grows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from mgpu_llm.adapters.recorder.folder import CUT, Folder
from mgpu_llm.core import recording
from mgpu_llm.core.events import Event
from mgpu_llm.core.recording import Row

#: One recording does not grow beyond this, uncompressed; the closing notes have room in its last RESERVE_BYTES.
MOST_BYTES: Final = 64 << 20
RESERVE_BYTES: Final = 64 << 10

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Begin:
    attempt: int
    spawned_at: float
    header: Row


@dataclass(frozen=True, kw_only=True)
class End:
    outcome: str
    rows: tuple[Row, ...] = ()


Item = Begin | End | Row | Event


@dataclass(kw_only=True)
class _Growing:
    """The file that is being written, of which `fd` is -1 where it could not be made. `full`: it is as long as it may
    be. `broken`: it cannot be written, and nobody tries again."""

    begin: Begin
    fd: int = -1
    size: int = 0
    full: bool = False
    broken: bool = False


class Writer:
    """What fails is told once a recording."""

    def __init__(self, folder: Folder, now: Callable[[], datetime]) -> None:
        self._folder = folder
        self._now = now
        self._file: _Growing | None = None
        self._lines = list[bytes]()
        #: The attempt whose recording was begun last, and how its name begins.
        self.begun = (0, "")

    @property
    def writing(self) -> bool:
        return self._file is not None

    def adopt(self) -> None:
        """Finish what an earlier life left, and remove what is too much."""
        try:
            self._folder.adopt()
        except OSError as error:
            log.warning("record.failed", reason=_reason(error))

    def write(self, items: Iterable[Item]) -> None:
        """Never raises: what is wrong with one recording must not cost the next."""
        for item in items:
            try:
                self._take(item)
            except Exception as fault:  # noqa: BLE001 - of ours, and told so
                log.warning("record.failed", reason=f"a fault of the recorder: {type(fault).__name__}: {fault}")
                self._finish(CUT)
        self._add()

    def _take(self, item: Item) -> None:
        match item:
            case Begin():
                self._finish(CUT)
                self._begin(item)
                self._lines = [_line(item.header)]
            case End():
                self._add()
                self._lines = [_line(row) for row in item.rows]
                self._add(closing=True)
                self._finish(item.outcome)
            case dict():
                self._lines.append(_line(item))
            case _:
                row = None if self._file is None else recording.to_row(item, self._file.begin.spawned_at)
                self._lines += [] if row is None else [_line(row)]

    def _begin(self, begin: Begin) -> None:
        self._file = file = _Growing(begin=begin)
        rung = re.sub(r"[^a-z0-9.-]", "-", str(begin.header.get("rung", "base")).lower())
        try:
            file.fd = self._folder.open(self._now(), f"a{begin.attempt}-{rung}")
            self.begun = (begin.attempt, self._folder.beginning)
        except OSError as error:
            self._fail(file, error)

    def _add(self, *, closing: bool = False) -> None:
        """Write the lines that wait."""
        file, lines, self._lines = self._file, self._lines, []
        if file is None or file.broken or not lines or (file.full and not closing):
            return
        most = min(MOST_BYTES, self._folder.max_bytes) - (0 if closing else RESERVE_BYTES)
        fitting = _fitting(lines, most - file.size)
        if len(fitting) < len(lines) and not file.full:
            file.full = True
            t = json.loads(lines[len(fitting)]).get("t", 0.0)
            fitting.append(_line(recording.note(t, "limit", bytes=file.size)))
        rest = memoryview(b"".join(fitting))
        try:
            while rest:
                written = os.write(file.fd, rest)
                rest, file.size = rest[written:], file.size + written
            self._folder.grown(file.size)
        except OSError as error:
            self._fail(file, error)

    def _finish(self, outcome: str) -> None:
        self._add()
        file, self._file = self._file, None
        if file is None or file.fd < 0:
            return
        try:
            os.close(file.fd)
            # Where the disk is full there is no room to pack it either: the next life does.
            self._folder.close(outcome, pack=not file.broken)
        except OSError as error:
            self._fail(file, error)

    def _fail(self, file: _Growing, error: OSError) -> None:
        if not file.broken:
            log.warning("record.failed", attempt=file.begin.attempt, reason=_reason(error))
        file.broken = True


def _fitting(lines: list[bytes], room: int) -> list[bytes]:
    """The first lines, as many as fit."""
    for count, line in enumerate(lines):
        room -= len(line)
        if room < 0:
            return lines[:count]
    return list(lines)


def _line(row: Row) -> bytes:
    return json.dumps(row, separators=(",", ":"), default=str).encode() + b"\n"


def _reason(error: OSError) -> str:
    where = f" '{error.filename}'" if error.filename else ""
    return f"cannot write the recording{where}: {(error.strerror or str(error)).lower()}"
