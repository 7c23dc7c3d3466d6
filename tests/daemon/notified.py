"""The end of the notify socket that systemd has, read as it comes: the kernel queues only ten datagrams of a sender."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Notified:
    """Every datagram so far, in order."""

    def __init__(self, path: Path) -> None:
        self.messages: list[str] = []
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def environ(self, watchdog_s: float) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self._path), "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}

    def names(self) -> list[str]:
        return [message.partition("=")[0] for message in self.messages]

    def first(self, beginning: str) -> int:
        """Where the first message that begins so stands."""
        found = [n for n, message in enumerate(self.messages) if message.startswith(beginning)]
        assert found, f"no {beginning} in {self.messages}"
        return found[0]

    def has(self, beginning: str) -> bool:
        return any(message.startswith(beginning) for message in self.messages)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self._path))
        self._reader.join(30)
        self._socket.close()

    def _read(self) -> None:
        while message := self._socket.recv(65536):
            self.messages.append(message.decode("utf-8", "strict"))


@contextmanager
def notified(path: Path) -> Iterator[Notified]:
    manager = Notified(path)
    try:
        yield manager
    finally:
        manager.close()
