"""journald's own protocol: an entry is one datagram of fields, or, where it is too large for one, a sealed memfd.

The form is described in systemd's docs/JOURNAL_NATIVE_PROTOCOL.md (systemd 252). journald may be slow, stopped or on its way
back: whoever logs never waits for it.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import re
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/systemd/journal/socket")
#: What is kept while journald does not read. Lines of the engine get half of it, so that it cannot crowd the daemon's own out.
MOST_WAITING_BYTES: Final = 8 << 20
#: What one entry costs beside its bytes.
ENTRY_BYTES: Final = 200
BATCH: Final = 100
#: How often a journald that is gone is looked for, and at most how long a full one is waited for at a time.
RETRY_S: Final = 0.2
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0a-\x1f]")


def entry(fields: Mapping[str, str]) -> bytes:
    """The fields as journald reads them. A value may hold anything, line ends too."""
    parts = list[bytes]()
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        if _UNPRINTABLE.search(value):
            parts.append(b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), data))
    return b"".join(parts)


class _Sent(Enum):
    DONE = "journald has it, or never will"
    FULL = "journald has not yet read what it was given"
    GONE = "nobody listens"


class Journal:
    """journald, behind the socket at `path`; raises OSError where nobody listens there now.

    Nothing waits and nothing raises after that: what journald does not take at once is kept, within MOST_WAITING_BYTES, and
    given to it in order by a thread, once it reads again or is back. What is too much is counted, and `remark` makes the entry
    that says how much. May be used by any thread.
    """

    def __init__(self, path: Path, remark: Callable[[int], bytes]) -> None:
        self.path = path
        self._remark = remark
        self._socket = self._connected()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, said: bytes, *, of_engine: bool = False) -> None:
        with self._changed:
            if self._closed:
                return
            if not self._waiting and not self._dropped and self._give(said) is _Sent.DONE:
                return
            self._keep(said, MOST_WAITING_BYTES // 2 if of_engine else MOST_WAITING_BYTES)
            self._changed.notify_all()
            if self._thread is None:
                self._begin_thread()

    def linger(self, within_s: float) -> None:
        """Wait until journald has read everything: it looks at who has spoken when it reads, and finds no unit for a process that
        is no more."""
        ends = time.monotonic() + within_s
        while time.monotonic() < ends:
            with self._changed:
                if not self._waiting and self._unread() == 0:
                    return
            time.sleep(0.005)

    def close(self) -> None:
        """What has not been given yet is lost, and so is what is sent after that."""
        with self._changed:
            self._closed = True
            self._socket.close()
            self._changed.notify_all()

    def _keep(self, said: bytes, most_bytes: int) -> None:
        cost = len(said) + ENTRY_BYTES
        if self._bytes + cost > most_bytes:
            self._dropped += 1
            return
        self._waiting.append(said)
        self._bytes += cost

    def _begin_thread(self) -> None:
        self._thread = threading.Thread(target=self._catch_up, name="journal", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread to be had: the next line tries again
            self._thread = None

    def _catch_up(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                sent = self._give_waiting()
                now = self._socket
            if sent is _Sent.FULL:
                _wait_for_room(now)
            elif sent is _Sent.GONE:
                time.sleep(RETRY_S)

    def _give_waiting(self) -> _Sent:
        """Gives what journald takes now, and says last how much had to be thrown away. No more than BATCH at a time: whoever
        wants to say something waits for the lock."""
        for _ in range(min(len(self._waiting), BATCH)):
            sent = self._give(self._waiting[0])
            if sent is not _Sent.DONE:
                return sent
            self._bytes -= len(self._waiting.popleft()) + ENTRY_BYTES
            if not self._waiting and self._dropped:
                count, self._dropped = self._dropped, 0
                self._keep(self._remark(count), MOST_WAITING_BYTES)
        return _Sent.DONE

    def _give(self, said: bytes) -> _Sent:
        sent = self._give_once(said)
        if sent is not _Sent.GONE:
            return sent
        try:
            fresh = self._connected()
        except OSError:
            return _Sent.GONE
        self._socket.close()
        self._socket = fresh
        return self._give_once(said)

    def _give_once(self, said: bytes) -> _Sent:
        try:
            self._socket.send(said)
        except BlockingIOError:
            return _Sent.FULL
        except OSError as error:
            return self._give_large(said) if error.errno == errno.EMSGSIZE else _Sent.GONE
        return _Sent.DONE

    def _give_large(self, said: bytes) -> _Sent:
        try:
            with _sealed(said) as descriptor:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
                self._socket.sendmsg([], [rights])
        except BlockingIOError:
            return _Sent.FULL
        except OSError:
            # No memory, or no descriptors: what it holds up is worth more.
            self._dropped += 1
        return _Sent.DONE

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.connect(str(self.path))
        except OSError:
            made.close()
            raise
        return made

    def _unread(self) -> int:
        """How much of what journald was given it has not read; 0 where the kernel does not say."""
        found = array.array("i", [0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, found)
        return found[0]


@contextlib.contextmanager
def _sealed(said: bytes) -> Iterator[int]:
    """A memfd that nobody can change any more: journald reads no other from an ordinary user."""
    descriptor = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(said)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for_room(taken: socket.socket) -> None:
    """Until journald has read something of what it was given, or has gone, at most RETRY_S."""
    poll = select.poll()
    try:
        poll.register(taken, select.POLLOUT)
    except ValueError:  # closed meanwhile, because another thread has found journald back
        return
    poll.poll(RETRY_S * 1000)
