"""Ask the engine's API for proof of life (/health) and of service (a real one-token request)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from mgpu_llm.core.endpoint import Endpoint

#: How an answer of the server is read: it worked, it can never work, or it may work later.
_REFUSALS: Final = frozenset({400, 404, 405, 422, 501})
_UNAUTHORISED: Final = frozenset({401, 403})
#: RecursionError: JSON that is nested without end.
_TROUBLES: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError)
#: /v1/models has about 600 bytes a name, and a server may have hundreds of LoRA adapters.
_ANSWER_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`good`: the probe succeeded. `hopeless`: the server says that it never will. `detail`: one line."""

    good: bool
    detail: str
    hopeless: bool = False


class Probes:
    """The probes of one endpoint. Timeouts in seconds. Close it when done."""

    def __init__(self, endpoint: Endpoint, *, health_timeout_s: float, completion_timeout_s: float) -> None:
        self._endpoint = endpoint
        self._health_timeout_s = health_timeout_s
        self._completion_timeout_s = completion_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def allow(self, *, health_timeout_s: float, completion_timeout_s: float) -> None:
        """Other timeouts, from the next probe on."""
        self._health_timeout_s = health_timeout_s
        self._completion_timeout_s = completion_timeout_s

    async def health(self) -> Answer:
        """GET /health. It says that the API server lives, not that the GPUs work."""
        limit_s = self._health_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                status, text = await self._request("GET", "/health")
        except _TROUBLES as error:
            return Answer(good=False, detail=_trouble(error, limit_s))
        return Answer(good=status == 200, detail=f"/health answered {status}{_excerpt(text) if status != 200 else ''}")

    async def completion(self) -> Answer:
        """One token through the whole engine: a completion, or what a model that does not generate can do instead.

        Which of these a server has depends on its model (vLLM's supported tasks), so they are asked in turn.
        """
        limit_s = self._completion_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._prove()
        except _TROUBLES as error:
            return Answer(good=False, detail=_trouble(error, limit_s))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _prove(self) -> Answer:
        name, refusal = await self._served_name()
        if refusal is not None:
            return refusal
        refused = list[str]()
        requests: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}),
            ("/v1/embeddings", {"model": name, "input": "Hello"}),
            ("/pooling", {"model": name, "input": "Hello"}),
        )
        for path, body in requests:
            status, text = await self._request("POST", path, body)
            if status == 200:
                return Answer(good=True, detail=f"{path} answered")
            refused.append(f"{path} answered {status}{_excerpt(text)}")
            if status not in _REFUSALS:
                return Answer(good=False, detail=refused[-1], hopeless=status in _UNAUTHORISED)
        return Answer(good=False, detail="; ".join(refused), hopeless=True)

    async def _served_name(self) -> tuple[str, Answer | None]:
        """The name to ask for: the server's own list is the truth, whatever config and arguments say."""
        status, text = await self._request("GET", "/v1/models")
        if status in _UNAUTHORISED:
            return "", Answer(
                good=False, detail=f"/v1/models answered {status}: the API key is not accepted", hopeless=True
            )
        if status != 200:
            return "", Answer(good=False, detail=f"/v1/models answered {status}{_excerpt(text)}")
        names = _names(text)
        if self._endpoint.served_name in names or not names:
            return self._endpoint.served_name or "", None
        return names[0], None

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"} if self._endpoint.api_key else {}
        # The certificate is not checked: the probe asks whether our own child works, and a self-signed one is common.
        async with self._connected().request(
            method, self._endpoint.url + path, json=body, headers=headers, ssl=False, allow_redirects=False
        ) as response:
            return response.status, (await _beginning(response.content)).decode("utf-8", "replace")

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            # One connection a request: a pooled one to an engine that has been replaced would fail the next probe.
            unix = self._endpoint.uds
            connector = (
                aiohttp.UnixConnector(path=unix, force_close=True) if unix else aiohttp.TCPConnector(force_close=True)
            )
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """The whole body, or its first _ANSWER_BYTES. (`read(n)` gives whatever has arrived so far.)"""
    try:
        return await content.readexactly(_ANSWER_BYTES)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


def _names(text: str) -> list[str]:
    document = json.loads(text)
    data = document.get("data") if isinstance(document, dict) else None
    entries = data if isinstance(data, list) else []
    return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _trouble(error: BaseException, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    return f"{type(error).__name__}: {error}"


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return f": {flat[:200]}" if flat else ""
