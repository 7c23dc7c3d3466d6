"""journald made small: a datagram socket whose entries are read as docs/JOURNAL_NATIVE_PROTOCOL.md of systemd says."""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

#: More than a datagram holds.
ENTRY_BYTES = 1 << 20
#: Fields that a client may set (journal_field_valid of systemd 252).
NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


class FakeJournald:
    """Listens at `path` from construction to `close`. `stream` may be given to a daemon as its stderr, and `environ` says that it
    is the journal's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(30)
        self._file = tempfile.TemporaryFile("w+", dir=path.parent)  # noqa: SIM115 - it lives as long as this
        self.stream = self._file
        found = os.fstat(self.stream.fileno())
        self.environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """It is gone, and its socket with it."""
        self._socket.close()
        self.path.unlink(missing_ok=True)
        self._file.close()

    def entry(self) -> dict[str, str]:
        """The next entry; TimeoutError where none comes."""
        said, ancillary, _, _ = self._socket.recvmsg(ENTRY_BYTES, socket.CMSG_SPACE(4))
        return fields(_of_memfd(ancillary[0][2]) if ancillary else said)

    def entries(self, count: int) -> list[dict[str, str]]:
        return [self.entry() for _ in range(count)]

    def printed(self) -> str:
        """What came by the stream."""
        self.stream.flush()
        return Path(f"/proc/self/fd/{self.stream.fileno()}").read_text("utf-8")


def fields(said: bytes) -> dict[str, str]:
    """AssertionError for what journald would throw away."""
    found = dict[str, str]()
    while said:
        name, _, rest = said.partition(b"\n")
        if b"=" in name:
            name, _, value = name.partition(b"=")
            said = rest
        else:
            (length,) = struct.unpack_from("<Q", rest)
            value, end, said = rest[8 : 8 + length], rest[8 + length : 9 + length], rest[9 + length :]
            assert (len(value), end) == (length, b"\n")
        key = name.decode("ascii")
        assert NAME.fullmatch(key)
        assert key not in found
        found[key] = value.decode()
    return found


def _of_memfd(rights: bytes) -> bytes:
    [descriptor] = array.array("i", rights)
    with os.fdopen(descriptor, "rb") as file:
        every_seal = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & every_seal == every_seal
        file.seek(0)
        return file.read()
