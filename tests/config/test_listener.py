from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mgpu_llm.config.endpoint import Listening
from mgpu_llm.config.listener import port_trouble, socket_trouble, trouble
from tests.config.loading import free_port, unprivileged

ME = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"


def test_a_free_port_is_no_trouble() -> None:
    assert port_trouble("127.0.0.1", free_port()) == ""
    assert port_trouble("", free_port()) == ""
    assert port_trouble("localhost", free_port()) == ""


def test_a_listener_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port_trouble("127.0.0.1", port) == f"{ME} has the port"
        assert port_trouble("0.0.0.0", port) == f"{ME} has the port"


def test_a_listener_at_another_address_of_the_same_name_is_found_although_binding_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with "localhost", which most hosts know as ::1 and 127.0.0.1: vLLM binds one, clients try both."""
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        assert port_trouble("localhost", port) == ""
        both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port)) for last in (1, 2)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: both)
        assert port_trouble("localhost", port) == f"{ME} has the port"


def test_an_ipv6_listener_is_found() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this host has no IPv6")
    with server:
        assert port_trouble("::", server.getsockname()[1]) == f"{ME} has the port"
    assert port_trouble("::1", free_port("::1")) == ""


def test_a_port_that_is_bound_and_not_listened_on_yet_is_taken() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        assert port_trouble("127.0.0.1", server.getsockname()[1]) == "another process has the port"


def test_connections_left_by_a_server_that_is_gone_are_no_trouble() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        answer, _ = server.accept()
    answer.close()  # the server's end first: it is the one that waits out TIME_WAIT
    client.close()
    assert port_trouble("127.0.0.1", port) == ""


def test_a_listener_whose_owner_may_not_be_seen_is_still_a_listener(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port_trouble("127.0.0.1", port, tmp_path) == "another process has the port"


def test_a_process_that_goes_while_it_is_looked_at_is_passed_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / "net").mkdir()
        (tmp_path / "net" / "tcp").write_text(f"header\n 0: 0100007F:{port:04X} 0:0 0A 0:0 0:0 0 0 0 77 1\n")
        (tmp_path / "1").mkdir()
        (tmp_path / "2" / "fd").mkdir(parents=True)
        (tmp_path / "2" / "fd" / "0").symlink_to("socket:[78]")
        assert port_trouble("127.0.0.1", port, tmp_path) == "another process has the port"
        (tmp_path / "3" / "fd").mkdir(parents=True)
        (tmp_path / "3" / "fd" / "0").symlink_to("socket:[77]")
        (tmp_path / "3" / "comm").write_text("vllm\n")
        assert port_trouble("127.0.0.1", port, tmp_path) == "vllm (pid 3) has the port"


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "this host has no such address"),
        ("no-such-host.invalid", "the host's name has no address"),
        ("a..b", "the host's name has no address"),
    ],
)
def test_an_address_that_is_not_this_hosts_says_so(host: str, why: str) -> None:
    assert port_trouble(host, 8000) == why


def test_an_address_that_needs_more_to_be_complete_is_told_in_the_systems_words() -> None:
    try:
        free_port("::1")
    except OSError:
        pytest.skip("this host has no IPv6")
    assert port_trouble("fe80::1", 8000) == "Invalid argument"


def test_a_port_that_needs_a_privilege_says_so() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("this host lets everybody have low ports")
    with unprivileged():
        assert port_trouble("127.0.0.1", 1) == "ports below 1024 need a privilege (CAP_NET_BIND_SERVICE)"


def test_a_unix_socket_is_trouble_only_where_vllm_could_not_have_it(tmp_path: Path) -> None:
    path = str(tmp_path / "v.sock")
    assert socket_trouble(path) == ""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert socket_trouble(path) == "somebody listens there already"
    assert socket_trouble(path) == "", "left over: nobody answers"
    (tmp_path / "file").write_text("")
    assert socket_trouble(str(tmp_path / "file")) == "there is a file of that name"
    assert socket_trouble(str(tmp_path / "no" / "v.sock")) == "its folder does not exist"
    assert socket_trouble(str(tmp_path / ("x" * 120))) == "AF_UNIX path too long"


def test_where_the_engine_shall_listen_decides_what_is_asked(tmp_path: Path) -> None:
    free = free_port()
    assert trouble(Listening(host="127.0.0.1", port=free)) == ""
    with socket.create_server(("127.0.0.1", free)):
        assert trouble(Listening(host="127.0.0.1", port=free)) == f"{ME} has the port"
        # With a Unix socket the port means nothing.
        assert trouble(Listening(host="127.0.0.1", port=free, uds=str(tmp_path / "engine.sock"))) == ""
