"""Clients of the control socket that mean no good: whatever they send, and however many they are, the next one is answered."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgpu_llm.ctl.client import Client
from tests.ctl.daemons import SampleBackend, daemon
from tests.ctl.samples import STARTING

METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "PRI", "", "get")
TARGETS = (
    "/v1/status",
    "/v1/logs?lines=7",
    "/v1/stop",
    "/v1/incidents/../../etc",
    "*",
    "http://a/v1/status",
    "/%00",
    "",
)
HEADERS = (
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 99999999",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Connection: keep-alive, Upgrade",
    "Upgrade: websocket",
    "Host: a\0b",
    ": nothing",
    f"X: {'y' * 9000}",
)
#: Requests that are nearly right, and anything else.
REQUESTS = st.builds(
    lambda method, target, headers, body: f"{method} {target} HTTP/1.1\r\n{''.join(headers)}\r\n".encode() + body,
    st.sampled_from(METHODS),
    st.one_of(st.sampled_from(TARGETS), st.text(max_size=40)),
    st.lists(st.sampled_from(HEADERS).map(lambda header: f"{header}\r\n"), max_size=4),
    st.binary(max_size=64),
)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, SampleBackend]]:
    """A socket that is attacked by one test after the other."""
    backend = SampleBackend()
    with daemon(tmp_path_factory.mktemp("run"), backend) as path:
        yield path, backend


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    said=st.one_of(REQUESTS, st.lists(REQUESTS, max_size=3).map(b"".join), st.binary(max_size=300)),
    hangs_up=st.booleans(),
)
def test_whatever_a_client_says_the_next_one_is_answered(
    attacked: tuple[Path, SampleBackend], said: bytes, hangs_up: bool
) -> None:
    path, _ = attacked
    with socket.socket(socket.AF_UNIX) as rude, suppress(ConnectionError):
        rude.settimeout(30)
        rude.connect(str(path))
        rude.sendall(said)
        rude.shutdown(socket.SHUT_RDWR if hangs_up else socket.SHUT_WR)
        while not hangs_up and rude.recv(65536):
            pass
    assert Client(str(path)).status() == STARTING


def test_a_thousand_that_sit_there_keep_nobody_out(attacked: tuple[Path, SampleBackend]) -> None:
    path, _ = attacked
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with ExitStack() as stack:
            for number in range(min(1000, (hard - 200) // 2)):
                sits = stack.enter_context(socket.socket(socket.AF_UNIX))
                sits.settimeout(30)
                sits.connect(str(path))
                sits.sendall(b"" if number % 2 else b"GET /v1/status HTTP/1.1\r\nX: ")
            assert Client(str(path)).status() == STARTING
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert Client(str(path)).status() == STARTING


def test_none_of_them_has_asked_for_anything_that_is_not_a_verb(attacked: tuple[Path, SampleBackend]) -> None:
    _, backend = attacked
    assert {verb for verb, _ in backend.asked} <= {"stop"}
