"""What the kernel says from now on, as far as it may explain a failure: /dev/kmsg, or the journal where that is refused.

Nothing here waits: descriptors do not block, one reading takes a bounded number of records, and what a flood says beyond a
budget is left out. A kernel that complains of one device ten thousand times a second must cost neither the loop nor the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host.kernel_log import KMSG, MATTERS
from mgpu_llm.adapters.host.program import Unanswered, ask

#: The kernel's own limit for a record with its fields (printk's PRINTK_MESSAGE_MAX, before 6.4 CONSOLE_EXT_LOG_MAX).
RECORD_BYTES: Final = 8192
RECORDS_AT_ONCE: Final = 200
#: A kernel in a flood may overwrite the next record again and again before it is read; then the loop comes first.
TRIES: Final = 10
#: A line of the kernel has at most about 1000 characters.
LINE_CHARS: Final = 1000
#: So many lines may be handed on at once, and so many a second in the long run: an hour's load records 820 of each sort.
BURST: Final = 100
LINES_PER_S: Final = 0.2
PROBE_S: Final = 2.0
END_S: Final = 0.2
JOURNALCTL: Final = ("journalctl", "-k", "-q", "--no-pager", "-o", "json", "--output-fields=MESSAGE")


class Followed:
    """A source of the kernel's lines that is open. Belongs to one thread, the loop's.

    `tells` says whether a line names a cause: those have a budget of their own, so that a flood of others cannot hide one.
    """

    def __init__(self, descriptor: int, clock: Callable[[], float], tells: Callable[[str], bool]) -> None:
        self._descriptor = descriptor
        self._tells = tells
        self._budgets = {True: _Budget(clock), False: _Budget(clock)}
        #: Why nothing more will come, "" as long as something may.
        self.ended = ""
        #: Whether the last reading has left something to be read.
        self.more = False

    def fileno(self) -> int:
        """To be polled: it is readable when there is something to hear."""
        return self._descriptor

    def heard(self) -> tuple[str, ...]:
        """The lines that matter since the last time, oldest first, of one reading. Raises nothing and never waits."""
        return tuple(line[:LINE_CHARS] for line in self._lines() if self._is_handed_on(line))

    def close(self) -> None:
        os.close(self._descriptor)

    def _lines(self) -> Iterator[str]:
        """The lines of one reading: of one record each, as many records as there are, up to RECORDS_AT_ONCE."""
        self.more = False
        for _ in range(RECORDS_AT_ONCE):
            if not (record := self._read(RECORD_BYTES)):
                return
            yield from _kernels_own(record)
        self.more = True

    def _read(self, size: int) -> bytes:
        """b"" where there is nothing to read now, or never again."""
        for _ in range(0 if self.ended else TRIES):
            try:
                read = os.read(self._descriptor, size)
            except BlockingIOError:
                break
            except OSError as error:
                if (
                    error.errno == errno.EPIPE
                ):  # overwritten before we came: the next read gives the oldest that is left
                    continue
                self.ended = f"cannot read what the kernel says: {(error.strerror or '').lower()}"
                break
            if not read:
                self.ended = "what tells the kernel's messages has ended"
            return read
        return b""

    def _is_handed_on(self, line: str) -> bool:
        tells = self._tells(line)
        return bool(tells or MATTERS.search(line)) and self._budgets[tells].take()


class _Journal(Followed):
    """`journalctl --follow`, whose output is one JSON object a line: the journal has line ends in messages, where the kernel
    itself writes "\\x0a", and what follows one would look like a message of its own."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        descriptor: int,
        clock: Callable[[], float],
        tells: Callable[[str], bool],
    ) -> None:
        super().__init__(descriptor, clock, tells)
        self._child = child
        self._unfinished = b""

    def close(self) -> None:
        super().close()
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in the kernel is left to init
            self._child.wait(END_S)

    def _lines(self) -> Iterator[str]:
        read = self._read(RECORD_BYTES)
        self.more = len(read) == RECORD_BYTES
        *lines, self._unfinished = (self._unfinished + read).split(b"\n")
        self._unfinished = self._unfinished[:RECORD_BYTES]
        for line in lines:
            yield from _message(line)


class _Budget:
    """BURST lines, and LINES_PER_S more as time goes by."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._left = float(BURST)

    def take(self) -> bool:
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._at) * LINES_PER_S)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def follow(clock: Callable[[], float], tells: Callable[[str], bool], kmsg: Path = KMSG) -> Followed:
    """Open the kernel's messages at their present end. May take PROBE_S: belongs to a thread.

    Raises Unanswered where this user may see them neither in /dev/kmsg (which needs CAP_SYSLOG where kernel.dmesg_restrict is
    set, as Debian and Ubuntu have it) nor in the journal.
    """
    try:
        descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        refused = f"cannot open {kmsg}: {(error.strerror or '').lower()}"
        cure = "; adduser mgpu-llm systemd-journal allows it" if isinstance(error, PermissionError) else ""
    else:
        with contextlib.suppress(OSError):  # what stands in for it in a test is a pipe, which has no past
            os.lseek(descriptor, 0, os.SEEK_END)
        return Followed(descriptor, clock, tells)
    try:
        child, descriptor = _followed_journal()
    except Unanswered as silence:
        raise Unanswered(f"{refused}; {silence}{cure}") from None
    return _Journal(child, descriptor, clock, tells)


def _followed_journal() -> tuple[subprocess.Popen[bytes], int]:
    """Raises Unanswered. A journal that shows this user no line of the kernel would be followed in vain."""
    if not ask([*JOURNALCTL, "-n", "1"], limit_s=PROBE_S).strip():
        raise Unanswered("journalctl shows no line of the kernel to this user")
    descriptor, output = os.pipe2(os.O_CLOEXEC)
    try:
        child = subprocess.Popen(
            [*JOURNALCTL, "-f", "-n", "0"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a Ctrl-C in our terminal is for us alone
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        os.close(descriptor)
        raise Unanswered(f"cannot run journalctl: {(error.strerror or '').lower()}") from None
    finally:
        os.close(output)
    os.set_blocking(descriptor, False)
    return child, descriptor


def _message(line: bytes) -> Iterator[str]:
    """What an entry of the journal says, in one line; nothing where that is no text."""
    with contextlib.suppress(ValueError, RecursionError):
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(said := entry.get("MESSAGE"), str):
            yield " ".join(said.splitlines())


def _kernels_own(record: bytes) -> Iterator[str]:
    """The text of a record, "priority,number,microseconds,flags[,...];text" and lines of fields that begin with a space
    (Documentation/ABI/testing/dev-kmsg). What a program has written into the buffer is none of the kernel's words: the kernel
    gives that another facility than 0, and a journal that forwards to it would have us hear ourselves."""
    for line in record.decode("utf-8", "replace").split("\n"):
        head, found, text = line.partition(";")
        priority = head.partition(",")[0]
        if found and priority.isdecimal() and int(priority) < 8:
            yield text
