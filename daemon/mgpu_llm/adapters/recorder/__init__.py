"""Recordings of attempts on disk, one file each, written beside the loop (docs/recordings.md has the format).

    20261124T210500Z-a3-p2p-off-running.jsonl         while the attempt loads
    20261124T210500Z-a3-p2p-off-stalled.jsonl.gz      once it is over

To be wired so; nothing here ever blocks for the disk or raises because of it:

    recorder = Recorder(state_dir / "records", keep=config.records.keep, max_bytes=config.records.max_size << 20)
    recorder.begin(attempt, spawned_at, recording.note(0, "attempt", format=recording.FORMAT, rung="p2p-off", ...))
    recorder.take(event)                      every event of the loop; what is of no attempt, or of another, is passed over
    recorder.end("stalled", [recording.note(t, "stopping"), recording.note(t, "outcome", ...)])
    recorder.close()                          when the loop has ended; waits at most 3 s

With None for the folder, or keep = 0, all of these do nothing; what is in the folder then stays as it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.recorder.folder import CUT, Folder
from mgpu_llm.adapters.recorder.writer import Begin, End, Item, Writer
from mgpu_llm.core import recording
from mgpu_llm.core.events import EngineEvent, Event, Request, Ticked
from mgpu_llm.core.recording import Row

#: The writer looks into its queue so often, and at once when so many wait. What comes while MOST_WAITING wait is lost.
PAUSE_S: Final = 1.0
MANY_WAITING: Final = 1000
MOST_WAITING: Final = 10_000
CLOSE_S: Final = 3.0


class Recorder:
    """Keeps at most `keep` recordings and `max_bytes` of them in `folder`, the newest. All methods belong to one
    thread, the loop's; the files belong to a thread of the recorder. `now` gives the UTC time for names."""

    def __init__(
        self,
        folder: Path | None,
        *,
        keep: int,
        max_bytes: int,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._waiting: deque[Item] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._begun: Begin | None = None
        self._lost = 0
        self._outcome = ""
        self._writer: Writer | None = None
        self._thread: threading.Thread | None = None
        if folder is not None and keep > 0:
            self._writer = writer = Writer(Folder(folder, keep=keep, max_bytes=max_bytes), now)
            # Our own, not an executor's: those are joined when the interpreter exits, and a dead disk never answers.
            self._thread = threading.Thread(target=self._serve, args=(writer,), name="recorder", daemon=True)
            self._thread.start()

    def begin(self, attempt: int, spawned_at: float, header: Row) -> None:
        """An attempt is spawned; `header` is its first row, whose "rung" goes into the file's name. One that was not
        ended is cut."""
        if self._thread is None:
            return
        self._begun, self._lost = Begin(attempt=attempt, spawned_at=spawned_at, header=header), 0
        self._waiting.append(self._begun)
        self._wake.set()

    def take(self, event: Event) -> None:
        """Record the event if it is one of the attempt and of a recorded kind: whole, as it is judged."""
        begun = self._begun
        if begun is None or isinstance(event, Ticked | Request) or event.attempt != begun.attempt:
            return
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        self._tell_lost(begun, event)
        self._waiting.append(event)
        if len(self._waiting) >= MANY_WAITING:
            self._wake.set()

    def note(self, at: float, row: Callable[[float], Row]) -> None:
        """Write a row of our own into the recording that is under way, if there is one: `row` is given the seconds since the
        spawn at the moment `at`."""
        if self._begun is not None:
            self._waiting.append(row(max(0.0, at - self._begun.spawned_at)))

    def end(self, outcome: str, rows: Iterable[Row]) -> None:
        """The attempt has come to `outcome` (a word of a-z), which goes into the file's name; `rows` close it."""
        if self._begun is None:
            return
        self._begun, self._outcome, closing = None, outcome, list(rows)
        if self._lost:
            self._waiting.append(recording.note(closing[0]["t"] if closing else 0.0, "lost", count=self._lost))
        self._waiting.append(End(outcome=outcome, rows=tuple(closing)))
        self._wake.set()

    def name(self, attempt: int) -> str:
        """The recording of an attempt that is over, by the name that it has or will have; "" where there is none."""
        number, beginning = (0, "") if self._writer is None else self._writer.begun
        return f"{beginning}{self._outcome}.jsonl.gz" if beginning and number == attempt else ""

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Finish the files, within `limit_s`; what is not finished by then is finished by the next daemon."""
        self._begun = None
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(limit_s)

    def _tell_lost(self, begun: Begin, event: EngineEvent) -> None:
        if self._lost:
            self._waiting.append(recording.note(max(0.0, event.at - begun.spawned_at), "lost", count=self._lost))
            self._lost = 0

    def _serve(self, writer: Writer) -> None:
        writer.adopt()
        while True:
            self._wake.wait(PAUSE_S if writer.writing else None)
            self._wake.clear()  # before we look: what is said from now on wakes us again
            closing = self._closing
            writer.write([self._waiting.popleft() for _ in range(len(self._waiting))])
            if closing:
                writer.write([End(outcome=CUT)])
                return
