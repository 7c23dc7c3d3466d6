"""The metrics page for Prometheus: HTTP on a TCP address, served by aiohttp, written by prometheus_client.

Anybody who reaches the address may ask, so nobody can make it costly: the page is made once a second at most, an answer ends its
connection, and where too many are open the one that has been there longest goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mgpu_llm.core.metrics import Family, Kind, Values

PATH: Final = "/metrics"
#: The format that every Prometheus reads, and that generate_latest writes.
TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
#: What is told is as old as this at most.
FRESH_S: Final = 1.0
#: Prometheus needs one connection, and so does a curious admin.
MOST_CLIENTS: Final = 32
#: So many may come while the loop is busy; beyond that the kernel lets them try again a second later. The loop takes them all in
#: one turn, at some 50 us each.
BACKLOG: Final = 256
#: An answer is given at once. Who stays longer than this, or at most twice this, holds a file descriptor for nothing.
LONGEST_S: Final = 5.0
GOODBYE_S: Final = 1.0
#: Whoever has the port may be gone a little later: a daemon before us, an exporter that was given another.
RETRY_S: Final = 15.0

Told = Callable[[], Iterable[tuple[Family, Values]]]
#: Why nobody can listen on a host's port, as far as that can be found out.
Trouble = Callable[[str, int], Awaitable[str | None]]

log = structlog.get_logger()
#: aiohttp would write an error into our log for every client that does not speak HTTP.
_silent: Final = logging.getLogger(f"{__name__}.clients")
_silent.disabled = True


@asynccontextmanager
async def serving(
    where: tuple[str, int] | None,
    told: Told,
    trouble: Trouble,
    *,
    retry_s: float = RETRY_S,
) -> AsyncIterator[None]:
    """Serves what `told` gives at `where` (IP address and port; None: nowhere) as long as it is entered. Where that cannot be,
    `trouble` is asked why for the warning, and it is tried again and again."""
    if where is None:
        yield
        return
    runner = web.AppRunner(_application(_Page(told)), access_log=None, logger=_silent, shutdown_timeout=GOODBYE_S)
    await runner.setup()
    assert runner.server is not None, "setup makes it"  # noqa: S101 - for the type alone
    listening = asyncio.create_task(_listen(runner.server, where, trouble, retry_s))
    try:
        yield
    finally:
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await runner.cleanup()


async def _listen(
    server: web.Server,
    where: tuple[str, int],
    trouble: Trouble,
    retry_s: float,
) -> None:
    listener = await _bound(server, where, trouble, retry_s)
    log.info("metrics.serving", url=f"http://{_in_words(where)}{PATH}")
    try:
        await _hang_up_on_the_slow(server)
    finally:
        listener.close()


async def _bound(
    server: web.Server,
    where: tuple[str, int],
    trouble: Trouble,
    retry_s: float,
) -> asyncio.Server:
    loop, warned = asyncio.get_running_loop(), False
    while True:
        try:
            return await loop.create_server(lambda: _let_in(server), *where, backlog=BACKLOG, reuse_address=True)
        except OSError as error:
            if not warned:
                log.warning(
                    "metrics.unavailable",
                    listen=_in_words(where),
                    why=await trouble(*where) or error.strerror or str(error),
                    advice='set metrics.listen to another address, or to "off"',
                    next=f"tried again every {retry_s:g} s",
                )
                warned = True
        await asyncio.sleep(retry_s)


def _let_in(server: web.Server) -> asyncio.BaseProtocol:
    """Room for one more is made by who has been there longest: a client that asks is served before one that only sits there."""
    inside = server.connections
    for longest in inside[: max(len(inside) - MOST_CLIENTS + 1, 0)]:
        _hang_up(longest)
    return server()


async def _hang_up_on_the_slow(server: web.Server) -> None:
    """aiohttp waits for ever for the first byte of a request, or for its last."""
    before = set[web.RequestHandler]()
    while True:
        await asyncio.sleep(LONGEST_S)
        inside = server.connections
        for client in before.intersection(inside):
            _hang_up(client)
        before = set(inside)


def _hang_up(client: web.RequestHandler) -> None:
    """At once: closing would wait until the client has read all of its answer."""
    transport = client.transport
    client.force_close()
    if transport is not None:
        transport.abort()


def _application(page: _Page) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=page.text(), headers={"Content-Type": TEXT})

    application = web.Application(client_max_size=1, middlewares=[_one_answer])
    application.router.add_get(PATH, metrics)
    return application


@web.middleware
async def _one_answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """After which the connection is closed: nobody can ask for a thousand of them at once."""
    try:
        answer = await handler(request)
    except web.HTTPException as refusal:
        refusal.force_close()
        raise
    except Exception as error:  # noqa: BLE001 - a fault in the page must not cost the service, and is said here
        log.error("metrics.failed", error=f"{type(error).__name__}: {error}")
        answer = web.Response(status=500, text="a fault in the daemon; its journal has more\n")
    answer.force_close()
    return answer


class _Page:
    """The text of the page, no older than FRESH_S."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._made_at = float("-inf")
        self._text = b""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if now - self._made_at >= FRESH_S:
            self._text, self._made_at = generate_latest(self._registry), now
        return self._text

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls for every page."""
        for family, values in self._told():
            yield _metric(family, values)


def _metric(family: Family, values: Values) -> Metric:
    kind = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    metric = kind(family.full_name, family.help, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _in_words(where: tuple[str, int]) -> str:
    host, port = where
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
