"""Whether an address is free to listen on, asked the way vLLM will take it, and who has it if not."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mgpu_llm.config.endpoint import Listening, reachable

_CONNECT_TIMEOUT_S: Final = 1.0
_LISTENING: Final = "0A"  # TCP_LISTEN, include/net/tcp_states.h


def trouble(where: Listening) -> str:
    """Why vLLM could not listen there, "" if it could. Waits for a connection, 1 s at most."""
    return socket_trouble(where.uds) if where.uds is not None else port_trouble(where.host, where.port)


def port_trouble(host: str, port: int, proc: Path = Path("/proc")) -> str:
    """Why vLLM could not listen there, "" if it could.

    Binding alone misses ports that the host redirects (containers), and a listener at another address of the same name
    (localhost), who would get our probes; connecting alone misses one that has the port and does not listen yet, as
    vLLM while it loads.
    """
    try:
        _bind(host, port, reuse=True)
        if _answers(host, port):
            return _in_use(port, proc)
        _bind(host, port, reuse=False)
    except (socket.gaierror, UnicodeError):
        return "the host's name has no address"
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                return "" if _winding_down(port, proc) else _in_use(port, proc)
            case errno.EADDRNOTAVAIL:
                return "this host has no such address"
            case errno.EACCES:
                return "ports below 1024 need a privilege (CAP_NET_BIND_SERVICE)"
            case _:
                return error.strerror or str(error)
    return ""


def socket_trouble(path: str) -> str:
    """The same for a Unix socket. One that nobody answers at is left over and no trouble; it must go before a start."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_TIMEOUT_S)
        try:
            client.connect(path)
        except FileNotFoundError:
            return "" if Path(path).absolute().parent.is_dir() else "its folder does not exist"
        except ConnectionRefusedError:
            return "" if Path(path).is_socket() else "there is a file of that name"
        except OSError as error:
            return error.strerror or str(error)
    return "somebody listens there already"


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((reachable(host), port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _bind(host: str, port: int, *, reuse: bool) -> None:
    """As vLLM does it (entrypoints/launchers/launcher.py, 0.32.0): IPv6 only for a literal address, with SO_REUSEADDR."""
    family = socket.AF_INET
    with contextlib.suppress(ValueError):
        ipaddress.IPv6Address(host)
        family = socket.AF_INET6
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        server.bind((host, port))


def _winding_down(port: int, proc: Path) -> bool:
    """Whether connections of a server that is gone explain why the port is taken: these do not keep vLLM from it."""
    states = [state for _, state in _sockets_at(port, proc)]
    return bool(states) and _LISTENING not in states


def _in_use(port: int, proc: Path) -> str:
    inodes = {inode for inode, state in _sockets_at(port, proc) if state == _LISTENING}
    return f"{_owner(inodes, proc) or 'another process'} has the port"


def _sockets_at(port: int, proc: Path) -> Iterator[tuple[str, str]]:
    """(inode, state) of each TCP socket of this host's port (Documentation/networking/proc_net_tcp.rst)."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[1].endswith(f":{port:04X}"):
                    yield columns[9], columns[3]


def _owner(inodes: set[str], proc: Path) -> str:
    """ "name (pid 71)" of a process that has one of the sockets open, "" where it may not be seen."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in proc.glob("[0-9]*") if wanted else ():
        with contextlib.suppress(OSError):
            if any(str(link.readlink()) in wanted for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return ""
