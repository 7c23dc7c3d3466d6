"""An address to listen on, as the config writes it: "127.0.0.1:19400", "[::1]:19400"."""

from __future__ import annotations

import ipaddress


def address(text: str) -> tuple[str, int] | None:
    """Host and port, None for anything else. The host is an IP address: a name would have to be asked for, and nobody knows
    how long that takes."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        return None
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        found = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return None
    return (str(found), int(port)) if (found.version == 6) is bracketed else None
