"""What NCCL knows of the state of its ranks: its RAS service, asked in the words of the program ncclras.

NCCL since 2.24 (src/ras) lets each process that has a communicator listen on localhost:28028, or on NCCL_RAS_ADDR, unless
NCCL_RAS_ENABLE is 0. All of one user's on a host share the port (SO_REUSEPORT): who answers is chance, and may be of another
job or stopped, so it is asked again. The answer is of all ranks. One that has become silent just now is waited for, up to 5 s
whatever TIMEOUT says; one that has been silent for longer is named at once (seen with the server of 2.30.7).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PORT: Final = 28028
#: Who listens and is alive answers the first word in less than a millisecond.
GREETING_S: Final = 0.4
MOST_BYTES: Final = 1 << 20
#: The client's version 2 is of NCCL 2.24 to 2.30; servers answer theirs and go on (src/ras/client_support.cc).
GREETING: Final = b"CLIENT PROTOCOL 2\n"
GREETED: Final = b"SERVER PROTOCOL "
#: How many seconds NCCL shall wait for ranks that are late, and the question.
QUESTION: Final = b"TIMEOUT 1\nVERBOSE STATUS\n"
TABLES: Final = ((socket.AF_INET, Path("/proc/net/tcp")), (socket.AF_INET6, Path("/proc/net/tcp6")))
LISTENS: Final = "0A"
ANYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to ask, not to listen


class _Row(NamedTuple):
    """One socket of /proc/net/tcp or tcp6 (man 5 proc), the addresses as numbers are written."""

    family: int
    local: tuple[str, int]
    remote: tuple[str, int]
    state: str
    inode: str


class _StrangerError(Exception):
    """What listens is not NCCL's."""


def ask(environment: Mapping[str, str], pids: Sequence[int], limit_s: float) -> tuple[str, str]:
    """The answer for an engine of this environment and these processes, "" where there is none, and why there is none. Takes at
    most `limit_s`, besides the reading of /proc/PID/fd, which belongs to a thread."""
    if environment.get("NCCL_RAS_ENABLE", "1") == "0":
        return "", "NCCL_RAS_ENABLE=0 keeps it from answering"
    end, port = time.monotonic() + limit_s, _port(environment)
    own = _sockets(pids)
    listening = [row for row in _rows() if row.state == LISTENS and row.local[1] == port]
    ours = next((row for row in listening if row.inode in own), None)
    if ours is None:
        if listening:
            return "", f"port {port} is another's: no process of the engine is seen to listen there"
        return "", f"nothing listens on port {port}: the engine has not come to NCCL, or its NCCL is older than 2.24"
    host = ANYWHERE.get(ours.local[0], ours.local[0])
    why = "no answer in time"
    while (left_s := end - time.monotonic()) > 0:
        with socket.socket(ours.family, socket.SOCK_STREAM) as client:
            try:
                client.settimeout(min(GREETING_S, left_s))
                client.connect((host, port))
                _greet(client, min(end, time.monotonic() + GREETING_S))
                if _is_of(pids, client):
                    answer = _status(client, end)
                    return answer, "" if answer else "it has greeted and then said nothing"
                why = "another job's NCCL has answered"
            except TimeoutError:
                why = "no answer in time"
            except OSError as error:
                return "", f"it does not answer: {(error.strerror or str(error)).lower()}"
            except _StrangerError as stranger:
                return "", str(stranger)
    return "", why


def _greet(client: socket.socket, end: float) -> None:
    client.sendall(GREETING)
    said = b""
    while not said.endswith(b"\n"):
        client.settimeout(max(0.001, end - time.monotonic()))
        chunk = client.recv(256)
        said += chunk
        if not chunk or not said.upper().startswith(GREETED[: len(said)]) or len(said) > 256:
            raise _StrangerError(f"what listens there is not NCCL's: it says {said[:80]!r}")


def _status(client: socket.socket, end: float) -> str:
    """All that comes until the server has done, or until the end: what has come by then is worth having."""
    client.sendall(QUESTION)
    said = bytearray()
    with contextlib.suppress(OSError):
        while len(said) < MOST_BYTES:
            client.settimeout(max(0.001, end - time.monotonic()))
            if not (chunk := client.recv(65536)):
                return _text(said)
            said += chunk
    return f"{_text(said)}\n[more was not waited for]\n" if said else ""


def _text(said: bytearray) -> str:
    return said.decode("utf-8", "replace").removeprefix("OK\n")


def _port(environment: Mapping[str, str]) -> int:
    """Of "host:port" and "[address]:port"."""
    word = environment.get("NCCL_RAS_ADDR", "").rpartition(":")[2]
    return int(word) if word.isdecimal() and len(word) <= 5 else PORT


def _is_of(pids: Sequence[int], client: socket.socket) -> bool:
    """Whether the other end, which is a socket of its own since the connection was accepted, is one of these processes'."""
    us, there, own = client.getsockname()[:2], client.getpeername()[:2], _sockets(pids)
    return any(row.inode in own for row in _rows() if row.remote == us and row.local == there)


def _sockets(pids: Sequence[int]) -> frozenset[str]:
    """The inodes of all sockets that these processes hold, as far as they may be seen."""
    found = set[str]()
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for descriptor in os.listdir(folder):  # noqa: PTH208 - there may be thousands
                with contextlib.suppress(OSError):
                    target = os.readlink(f"{folder}/{descriptor}")  # noqa: PTH115 - likewise
                    if target.startswith("socket:["):
                        found.add(target[8:-1])
    return frozenset(found)


def _rows() -> list[_Row]:
    rows = list[_Row]()
    for family, table in TABLES:
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                rows.append(_Row(family, _address(fields[1]), _address(fields[2]), fields[3], fields[9]))
    return rows


def _address(written: str) -> tuple[str, int]:
    """From "0100007F:6D7C": 32 bits at a time in the host's order, and the port."""
    number, _, port = written.partition(":")
    packed = b"".join(struct.pack("=I", int(number[at : at + 8], 16)) for at in range(0, len(number), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), int(port, 16)
