"""What the engine prints, read so that the engine never waits for us however much it prints.

A pipe that is full blocks its writer in the middle of a load, so everything is read at once; only a bounded number of
lines a second is handed on, the rest is counted. Memory is bounded by one chunk, one unfinished line and the tail.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from mgpu_llm.core.events import LineRead, LinesDropped
from mgpu_llm.core.redaction import Redactor

PIPE_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
#: The one limit: what is judged is what is recorded.
LINE_BYTES = 8192
LINES_PER_S = 5000
LONG_BYTES = 1024
UNFINISHED_S = 1.0
REPORT_S = 1.0
#: Of a flood, so many of the last lines are handed on when it ends: the reason of a crash stands at the end.
LAST_WORDS = 100
CUT_MARK = " [line cut]"

#: CSI sequences (colours, cursor), OSC sequences (titles, links), and the two-byte escapes.
ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")


class Tail:
    """The last lines, at most `max_lines` of them and at most `max_bytes` in all."""

    def __init__(self, max_lines: int = 2000, max_bytes: int = 1 << 20) -> None:
        self._lines: deque[str] = deque()
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._bytes = 0
        self._fresh = 0

    def append(self, line: str) -> None:
        self._lines.append(line)
        self._fresh += 1
        self._bytes += len(line.encode())
        while self._lines and (len(self._lines) > self._max_lines or self._bytes > self._max_bytes):
            self._bytes -= len(self._lines.popleft().encode())

    def begin_anew(self) -> None:
        """Another engine speaks from now on."""
        self._fresh = 0

    def last_of_this(self, count: int) -> tuple[str, ...]:
        """As `last`, but without the lines of engines before this one."""
        return self.last(min(count, self._fresh))

    def last(self, count: int) -> tuple[str, ...]:
        """The last `count` lines, oldest first."""
        return tuple(self._lines)[-count:] if count > 0 else ()


class _Budget:
    """How many lines may be handed on now: LINES_PER_S, saved up for at most one second. A long one counts for several:
    what it costs to search and to judge grows with its length."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = float(LINES_PER_S)
        self._at = clock()

    def take(self, lines: list[bytes]) -> int:
        """So many of the first of `lines`."""
        now = self._clock()
        self._left = min(float(LINES_PER_S), self._left + (now - self._at) * LINES_PER_S)
        self._at = now
        for taken, line in enumerate(lines):
            cost = 1 + min(len(line), LINE_BYTES) // LONG_BYTES
            if cost > self._left:
                return taken
            self._left -= cost
        return len(lines)


class Apart:
    """Lines that are neither judged nor shown: the first, of `most_bytes` in all. A flood costs no more than its reading."""

    def __init__(self, most_bytes: int) -> None:
        self.lines: list[str] = []
        self._room = most_bytes

    @property
    def full(self) -> bool:
        return self._room <= 0

    def append(self, line: str) -> None:
        self.lines.append(line)
        self._room -= len(line.encode()) + 1


class Output:
    """One attempt's stdout and stderr: `write_fd` goes to the engine, lines come back as LineRead events.

    Lines end at \\r or \\n (progress bars end in \\r alone). Colours are removed, invalid UTF-8 is replaced, empty lines
    are left out, a line over LINE_BYTES is cut and marked. Secrets are taken out: what is handed on is shown and kept. An
    unfinished line is handed on after UNFINISHED_S, or when the pipe ends. Every line that is not empty is either handed
    on, in order, or counted in a LinesDropped.
    """

    def __init__(
        self,
        attempt: int,
        clock: Callable[[], float],
        emit: Callable[[LineRead | LinesDropped], None],
        tail: Tail,
        redactor: Redactor | None = None,
    ) -> None:
        self._attempt = attempt
        self._clock = clock
        self._emit = emit
        self._tail = tail
        self._redactor = redactor or Redactor()
        self._budget = _Budget(clock)
        self._loop = asyncio.get_running_loop()
        self._unfinished = b""
        self._skipping = False
        self._flush_timer: asyncio.TimerHandle | None = None
        self._waiting: list[bytes] = []
        self._dropped = 0
        self._report_timer: asyncio.TimerHandle | None = None
        self._apart: Apart | None = None
        self._read_fd, self.write_fd = os.pipe()
        self._open = True
        os.set_blocking(self._read_fd, False)
        # Over the user's pipe quota the default of 64 KiB stays: slower, not wrong.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._read_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def begin(self) -> None:
        """Read from now on, so that no line is told before the engine is."""
        self._loop.add_reader(self._read_fd, self._read_chunk)

    def close_write_end(self) -> None:
        """To be called once the child has its copy, or will never have one: else the pipe never ends."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def drain(self) -> None:
        """Hand on what lies in the pipe now, and the unfinished line: for the moment when the top process has ended.

        Bounded by the pipe's size, because orphans may go on printing.
        """
        for _ in range(PIPE_BYTES // CHUNK_BYTES + 1):
            if not self._open or not self._read_chunk():
                break
        self._finish()

    @contextlib.contextmanager
    def kept_apart(self, most_bytes: int) -> Iterator[Apart]:
        """What is printed while it lasts goes there, without secrets, and nowhere else."""
        self.drain()
        self._apart = apart = Apart(most_bytes)
        try:
            yield apart
            self.drain()
        finally:
            self._apart = None

    def close(self) -> None:
        """Read what is left and let go of the pipe. May be called twice."""
        self.close_write_end()
        self.drain()
        self._end()

    def _read_chunk(self) -> bool:
        """Whether there may be more. Ends the reading at the end of the pipe."""
        try:
            chunk = os.read(self._read_fd, CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._finish()
            self._end()
            return False
        self._take(chunk)
        return True

    def _take(self, chunk: bytes) -> None:
        data = (self._unfinished + chunk).replace(b"\r", b"\n")
        if self._skipping:
            _, end, data = data.partition(b"\n")
            self._skipping = not end
        *lines, self._unfinished = data.split(b"\n")
        if lines or not self._unfinished:
            self._stop_flush_timer()
        self._hand_on([line for line in lines if line])
        if len(self._unfinished) > LINE_BYTES:
            self._flush()
            self._skipping = True
        if self._unfinished and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(UNFINISHED_S, self._flush)

    def _stop_flush_timer(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _flush(self) -> None:
        self._stop_flush_timer()
        unfinished, self._unfinished = self._unfinished, b""
        self._hand_on([unfinished] if unfinished else [])

    def _hand_on(self, lines: list[bytes]) -> None:
        """Say what the budget allows, keep the last of the rest waiting, count what is before them."""
        if self._apart is not None:
            self._put_apart(self._apart, lines)
            return
        queue = [*self._waiting, *lines]
        now = self._budget.take(queue)
        self._say(queue[:now])
        self._waiting = queue[now:][-LAST_WORDS:]
        self._dropped += len(queue) - now - len(self._waiting)
        if (self._waiting or self._dropped) and self._report_timer is None:
            self._report_timer = self._loop.call_later(REPORT_S, self._report)

    def _put_apart(self, apart: Apart, lines: Iterable[bytes]) -> None:
        for line in lines:
            if apart.full:
                break
            if text := self._redactor.line(_readable(line)):
                apart.append(text)

    def _say(self, lines: Iterable[bytes]) -> None:
        at = self._clock()
        for line in lines:
            text = self._redactor.line(_readable(line))
            if text:
                self._tail.append(text)
                self._emit(LineRead(at=at, attempt=self._attempt, text=text))

    def _report(self) -> None:
        self._report_timer = None
        self._tell_dropped()
        self._hand_on([])

    def _tell_dropped(self) -> None:
        count, self._dropped = self._dropped, 0
        if count:
            self._tail.append(f"[{count} lines dropped: the engine printed more than {LINES_PER_S} lines a second]")
            self._emit(LinesDropped(at=self._clock(), attempt=self._attempt, count=count))

    def _finish(self) -> None:
        """Hand on whatever is still held back, over the budget if need be."""
        self._flush()
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None
        self._tell_dropped()
        waiting, self._waiting = self._waiting, []
        self._say(waiting)

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._read_fd)
            os.close(self._read_fd)


def _readable(line: bytes) -> str:
    text = ANSI.sub("", line[:LINE_BYTES].decode("utf-8", "replace")).rstrip()
    return text + CUT_MARK if len(line) > LINE_BYTES else text
