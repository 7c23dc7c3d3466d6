"""Where the engine's API listens, and how the daemon's probes reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.schema import Config
from mgpu_llm.core.endpoint import Endpoint

#: An address to listen on, and the one to reach it at.
_WILDCARDS: Final[Mapping[str, str]] = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where vLLM will listen: `args` weigh more than the config's own keys, and a Unix socket more than both."""

    host: str
    port: int
    uds: str | None = None


def listening(config: Config) -> Listening:
    """A --port that is none counts as absent here; the checks refuse it."""
    args, engine = config.engine.args, config.engine
    host, port = options.value(args, options.HOST), options.port(args)
    return Listening(
        host=engine.host if host is None else host,
        port=engine.port if port is None else port,
        uds=options.value(args, options.SOCKET) or None,
    )


def reachable(host: str) -> str:
    """The address at which this host reaches a server that listens on `host`."""
    return _WILDCARDS.get(host, host)


def endpoint(config: Config, environ: Mapping[str, str]) -> Endpoint:
    """The engine's endpoint. `environ` is what the daemon has and the engine inherits."""
    args, server = config.engine.args, listening(config)
    # As uvicorn decides: either of the two files turns TLS on.
    tls = bool(options.value(args, options.CERTIFICATE) or options.value(args, options.CERTIFICATE_KEY))
    host = "localhost" if server.uds else _in_url(reachable(server.host))
    return Endpoint(
        url=f"{'https' if tls else 'http'}://{host}" + ("" if server.uds else f":{server.port}"),
        uds=server.uds,
        api_key=_api_key(config, environ),
        served_name=options.value(args, options.SERVED_NAME) or config.model.served_name or None,
    )


def _api_key(config: Config, environ: Mapping[str, str]) -> str | None:
    """vLLM takes any of the keys on its command line, and only without those the one of its environment."""
    given = options.values(config.engine.args, options.API_KEY)
    keys = given or ({**environ, **config.engine.env}.get("VLLM_API_KEY", ""),)
    return next(filter(None, keys), None)


def _in_url(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    return f"[{str(address).replace('%', '%25')}]"
