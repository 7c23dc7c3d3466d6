"""Where the engine's API is, as the probes must ask it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The engine's HTTP API. `url` has no trailing slash ("http://127.0.0.1:8000"); with `uds` (a Unix socket) the connection
    goes to that path and the URL's host is only a name. The API key never shows in a repr."""

    url: str
    uds: str | None = None
    api_key: str | None = field(default=None, repr=False)
    served_name: str | None = None
