"""Talks to systemd by the protocol of sd_notify(3), through the sdnotify package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sdnotify
import structlog

#: systemd throws datagrams over 4096 bytes away, and `systemctl status` shows the text as one line.
STATUS_CHARACTERS = 400
#: How long a systemd that does not read may hold us up. Its queue takes several hundred messages first.
SEND_S = 0.5

log = structlog.get_logger()


class SystemdNotifier:
    """Does nothing without NOTIFY_SOCKET in `environ`. Never raises: what cannot be sent is logged, once per failure."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._channel: Any = None
        self._status = ""
        self._failing = False
        if address := environ.get("NOTIFY_SOCKET"):
            self._connect(address)

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def ready(self) -> None:
        self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only when it differs from the last one that was."""
        line = " ".join(text.split())
        if len(line) > STATUS_CHARACTERS:
            line = line[: STATUS_CHARACTERS - 1] + "…"
        if line != self._status and self._send(f"STATUS={line}"):
            self._status = line

    def extend_timeout(self, seconds: float) -> None:
        """systemd waits for the start (or stop) at least this long from now (EXTEND_TIMEOUT_USEC, since systemd 236)."""
        self._send(f"EXTEND_TIMEOUT_USEC={max(1, round(seconds * 1_000_000))}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def close(self) -> None:
        if self._channel is not None:
            self._channel.socket.close()
            self._channel = None

    def _connect(self, address: str) -> None:
        try:
            with _only_in_environ(address):
                self._channel = sdnotify.SystemdNotifier(debug=True)
            self._channel.socket.settimeout(SEND_S)
        except OSError as error:
            log.warning("systemd.unreachable", socket=address, error=str(error))

    def _send(self, message: str) -> bool:
        if self._channel is None:
            return False
        # sdnotify encodes as Latin-1 while systemd wants UTF-8 and refuses the whole datagram otherwise.
        encoded = message.encode("utf-8", "replace").decode("latin-1")
        try:
            self._channel.notify(encoded)
        except OSError as error:
            if not self._failing:
                log.warning("systemd.notify.failed", message=message, error=str(error))
            self._failing = True
            return False
        self._failing = False
        return True


@contextmanager
def _only_in_environ(address: str) -> Iterator[None]:
    """sdnotify knows no other way to be told the address than os.environ, which it reads while it is constructed."""
    before = os.environ.get("NOTIFY_SOCKET")
    os.environ["NOTIFY_SOCKET"] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ["NOTIFY_SOCKET"]
        else:
            os.environ["NOTIFY_SOCKET"] = before


def watchdog_interval_s(environ: Mapping[str, str]) -> float | None:
    """How often to send WATCHDOG=1: half of what systemd allows, as sd_watchdog_enabled(3) advises. None: not asked for.

    WATCHDOG_PID names the process that is watched; the variables are inherited, so another's are not ours.
    """
    allowed, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    if not (allowed.isascii() and allowed.isdigit()) or int(allowed) == 0:
        return None
    return int(allowed) / 1_000_000 / 2
