"""The metrics page: what is on it, where it is, and that no client keeps the loop or another client from it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mgpu_llm.adapters import metrics
from mgpu_llm.core.metrics import Family, Kind, Values
from tests.config.loading import free_port

DEADLINE_S = 20.0
UP = Family("things_total", Kind.COUNTER, 'Things, "quoted" and \\ with a backslash.', ("kind",))
HEAT = Family("heat", Kind.GAUGE, "Heat.")


async def nobody_knows(host: str, port: int) -> str | None:
    return None


@dataclass
class Source:
    """What is told: how often it was asked for, under an awkward label, and something without a value."""

    asked: int = 0
    fault: Exception | None = None

    def __call__(self) -> Iterable[tuple[Family, Values]]:
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        yield UP, {('a"b\\c\n',): float(self.asked)}
        yield HEAT, {}


@contextmanager
def serving(
    source: Source,
    port: int,
    host: str = "127.0.0.1",
    trouble: Callable[[str, int], Awaitable[str | None]] = nobody_knows,
) -> Iterator[None]:
    """The page in a loop of its own, as in the daemon."""
    entered, over = threading.Event(), threading.Event()

    async def life() -> None:
        async with metrics.serving((host, port), source, trouble, retry_s=0.05):
            entered.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(life()))
    thread.start()
    try:
        assert entered.wait(DEADLINE_S)
        yield
    finally:
        over.set()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def ask(port: int, target: str = "/metrics", method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str, str]:
    """Status, content type and body; waits until somebody listens."""
    give_up_at = time.monotonic() + DEADLINE_S
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=DEADLINE_S)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except ConnectionRefusedError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.02)
        finally:
            connection.close()


def test_the_page_is_what_prometheus_reads_with_values_labels_and_help_intact() -> None:
    port = free_port()
    with serving(Source(), port):
        code, kind, page = ask(port)
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = {family.name: family for family in text_string_to_metric_families(page)}
    things = families["mgpu_llm_things"]
    assert (things.type, things.documentation) == ("counter", UP.help)
    [sample] = things.samples
    assert (sample.name, sample.labels, sample.value) == ("mgpu_llm_things_total", {"kind": 'a"b\\c\n'}, 1.0)
    assert families["mgpu_llm_heat"].samples == []
    assert families["process_start_time_seconds"].samples
    assert families["python_info"].samples


def test_it_is_made_once_a_second_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FRESH_S", 3600.0)
    source, port = Source(), free_port()
    with serving(source, port):
        pages = {ask(port)[2] for _ in range(50)}
    assert (len(pages), source.asked) == (1, 1)
    monkeypatch.setattr(metrics, "FRESH_S", 0.0)
    with serving(source, port):
        assert len({ask(port)[2] for _ in range(5)}) == 5


def test_it_is_served_on_ipv6_too() -> None:
    port = free_port("::1")
    with serving(Source(), port, "::1"):
        assert ask(port, host="::1")[0] == 200


def test_there_is_nothing_else_and_nothing_can_be_changed() -> None:
    port = free_port()
    with serving(Source(), port):
        assert ask(port, "/")[0] == ask(port, "/v1/status")[0] == 404
        assert ask(port, method="POST")[0] == 405
        assert ask(port, method="HEAD")[0] == 200


@pytest.mark.parametrize("target", ["/metrics", "/elsewhere"])
def test_a_connection_has_one_answer_however_many_it_asks_for_at_once(target: str) -> None:
    port = free_port()
    with serving(Source(), port):
        ask(port)
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode() * 500)
            got = b""
            with contextlib.suppress(ConnectionError):
                while more := client.recv(1 << 16):
                    got += more
    assert got.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in got


def test_a_fault_in_the_page_is_a_500_without_detail_and_is_said_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    source, port = Source(fault=ZeroDivisionError("a detail")), free_port()
    with serving(source, port):
        code, _, page = ask(port)
        assert code == 500
        assert "detail" not in page
        source.fault = None
        assert ask(port)[0] == 200
    said = capfd.readouterr()
    assert "ZeroDivisionError: a detail" in said.out + said.err


def test_where_the_port_is_taken_it_warns_once_and_comes_when_the_port_is_free(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = list[tuple[str, int]]()

    async def trouble(host: str, port: int) -> str | None:
        asked.append((host, port))
        return "nginx (pid 7) has the port"

    with ExitStack() as stack:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            stack.enter_context(serving(Source(), port, trouble=trouble))
            time.sleep(0.3)  # several tries
        assert ask(port)[0] == 200
    said = "".join(capfd.readouterr())
    assert asked == [("127.0.0.1", port)]
    assert said.count("metrics.unavailable") == 1
    for words in (
        f"127.0.0.1:{port}",
        "nginx (pid 7) has the port",
        'set metrics.listen to another address, or to "off"',
    ):
        assert words in said
    assert said.count("metrics.serving") == 1


def test_an_address_that_this_host_has_not_is_told_in_the_systems_words(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(Source(), free_port(), "192.0.2.1"):
        give_up_at, said = time.monotonic() + DEADLINE_S, ""
        while "metrics.unavailable" not in said and time.monotonic() < give_up_at:
            time.sleep(0.02)
            said += "".join(capfd.readouterr())
    assert "assign requested address" in said


def test_switched_off_it_listens_nowhere_and_asks_for_nothing() -> None:
    source = Source()

    async def life() -> None:
        async with metrics.serving(None, source, nobody_knows):
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(life())
    assert source.asked == 0


def test_clients_that_never_finish_a_request_keep_nobody_from_it() -> None:
    port = free_port()
    with serving(Source(), port), ExitStack() as stack:
        ask(port)
        for number in range(200):
            rude = stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
            # Some say nothing, some begin a request, some promise a body, some do not read what they asked for.
            with contextlib.suppress(ConnectionError):
                rude.sendall(
                    (b"", b"GET /metr", b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"GET /x HTTP/1.1\r\n")[
                        number % 4
                    ]
                )
        assert ask(port)[0] == 200


def test_no_more_than_a_few_connections_are_kept_and_the_oldest_goes_first() -> None:
    port = free_port()
    with serving(Source(), port), ExitStack() as stack:
        ask(port)
        held = list[socket.socket]()
        for _ in range(metrics.MOST_CLIENTS + 20):
            held.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S)))
            ask(port)  # so that the one before is surely in
        first, last = held[0], held[-1]
        assert first.recv(1) == b""
        last.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        assert last.recv(15) == b"HTTP/1.1 200 OK"


def test_who_stays_too_long_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LONGEST_S", 0.1)
    port = free_port()
    with serving(Source(), port):
        ask(port)
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as slow:
            slow.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
            with contextlib.suppress(ConnectionError):
                assert slow.recv(1) == b""


def test_words_that_are_no_http_are_refused_and_do_not_fill_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    words = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000,
    )
    with serving(Source(), port):
        ask(port)
        capfd.readouterr()
        for rude in words * 5:
            with (
                socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client,
                contextlib.suppress(ConnectionError),
            ):
                client.sendall(rude)
                client.shutdown(socket.SHUT_WR)
                client.recv(100)
        assert ask(port)[0] == 200
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_the_loop_goes_round_while_many_ask_at_once() -> None:
    """What else the loop has to do is done between two answers, and never waits for all of them."""
    port, turns = free_port(), list[int]()

    async def life() -> None:
        async with metrics.serving(("127.0.0.1", port), Source(), nobody_knows):
            await asyncio.to_thread(ask, port)

            async def client() -> None:
                for _ in range(10):
                    with contextlib.suppress(ConnectionError):
                        reader, writer = await asyncio.open_connection("127.0.0.1", port)
                        writer.write(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
                        await reader.read()
                        writer.close()

            many = asyncio.gather(*(client() for _ in range(20)))
            while not many.done():
                turns.append(1)
                await asyncio.sleep(0)
            await many

    asyncio.run(life())
    assert len(turns) > 100


def test_it_ends_at_once_with_clients_that_would_stay() -> None:
    port = free_port()
    with ExitStack() as stack:
        with serving(Source(), port):
            ask(port)
            for _ in range(20):
                rude = stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
                rude.sendall(b"GET /metrics HTTP/1.1\r\n")
            ask(port)
            begun = time.monotonic()
        assert time.monotonic() - begun < metrics.LONGEST_S
