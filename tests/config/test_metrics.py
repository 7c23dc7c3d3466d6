"""The table [metrics]: where metrics are served, how that is switched off, and which ports cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config.address import address
from tests.config.loading import checked, config, problems

EXPECTED = 'expected "off", or an IP address and a port such as "127.0.0.1:19400"'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:19400", ("127.0.0.1", 19400)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]:9999", ("::", 9999)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, found: tuple[str, int]) -> None:
    assert address(text) == found
    assert config(f'metrics.listen = "{text}"').metrics.listen == text


@pytest.mark.parametrize(
    "text",
    ["", "19400", ":19400", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:999999", "::1:19400",
     "[127.0.0.1]:19400", "[::1:19400", "::1]:19400", "localhost:19400", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:1٣",
     " 127.0.0.1:19400", "on", "Off"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_what_would_be_right(text: str) -> None:
    assert address(text) is None
    [problem] = problems(f'metrics.listen = "{text}"')
    assert EXPECTED in problem
    assert "metrics.listen" in problem


def test_off_is_no_address_and_no_problem() -> None:
    assert config('metrics.listen = "off"').metrics.listen == "off"
    assert address("off") is None


def test_a_value_that_is_no_text_is_refused_alike() -> None:
    for value in ("19400", "false", "[]"):
        [problem] = problems(f"metrics.listen = {value}")
        assert EXPECTED in problem


def test_only_this_host_may_read_them_unless_it_is_said_otherwise() -> None:
    assert address(config("").metrics.listen) == ("127.0.0.1", 19400)


def test_the_default_port_is_nobody_elses() -> None:
    _, port = address(config("").metrics.listen) or ("", 0)
    # Of the engine, of Prometheus and its exporters, and of outgoing connections (net.ipv4.ip_local_port_range).
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port not in range(8000, 8100)
    assert port not in range(9090, 10100)
    assert port < min(first, 32768)


def test_the_engines_own_port_is_refused_wherever_it_was_set() -> None:
    text = "model.path = 'a/b'\nengine.command = ['true']\ngpus.use = 'none'\nmetrics.listen = '127.0.0.1:{}'\n"
    wrong = 'a.toml: metrics.listen: found "127.0.0.1:{0}", expected another port than the engine\'s, {0}'
    assert checked(text.format(8000)) == [wrong.format(8000)]
    assert checked(text.format(8001)) == []
    assert checked(text.format(8001) + "engine.port = 8001") == [wrong.format(8001)]
    assert checked(text.format(8001) + "engine.args = ['--port', '8001']") == [wrong.format(8001)]
    assert checked(text.format(8000) + "engine.args = ['--uds', '/tmp/none/x.sock']") == []
    assert checked("model.path = 'a/b'\nengine.command = ['true']\ngpus.use = 'none'\nmetrics.listen = 'off'") == []
