from __future__ import annotations

import asyncio
import grp
import http.client
import json
import os
import pwd
import socket
import stat
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.adapters import control_socket
from mgpu_llm.adapters.control_socket import serving
from mgpu_llm.control_api import rung_from_json, status_from_json
from mgpu_llm.core.status import Status
from tests.ctl.daemons import DEADLINE_S, SampleBackend, daemon
from tests.ctl.samples import DEGRADED, PLANS, RUNGS, SERVING, STATES


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, target: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = Connection(path)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json; charset=utf-8"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("state", STATES)
def test_each_status_comes_back_as_it_went_in(tmp_path: Path, state: str) -> None:
    with daemon(tmp_path, SampleBackend(STATES[state])) as path:
        code, document = ask(path, "GET", "/v1/status")
    assert (code, status_from_json(document)) == (200, STATES[state])


def test_a_degradation_comes_back_as_it_went_in(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(DEGRADED)) as path:
        assert status_from_json(ask(path, "GET", "/v1/status")[1]) == DEGRADED


def test_a_plan_is_given_for_the_cause_that_was_named_and_else_for_the_unknown_one(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        assert ask(path, "GET", "/v1/plan?cause=nccl%2Dp2p") == (200, PLANS["nccl-p2p"])
        assert ask(path, "GET", "/v1/plan") == (200, PLANS["unknown"])
        assert ask(path, "GET", "/v1/plan?cause=x%20y") == (400, {"error": 'there is no cause "x y"'})


def test_the_ladder_comes_back_as_it_went_in(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        code, document = ask(path, "GET", "/v1/ladder")
    assert (code, tuple(rung_from_json(rung) for rung in document["rungs"])) == (200, RUNGS)


def test_the_engines_last_lines_are_as_many_as_asked_for(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.lines = tuple(str(n) for n in range(80))
    with daemon(tmp_path, backend) as path:
        assert ask(path, "GET", "/v1/logs?lines=3") == (200, {"lines": ["77", "78", "79"]})
        assert len(ask(path, "GET", "/v1/logs")[1]["lines"]) == 50


@pytest.mark.parametrize("lines", ["0", "-1", "x", "", "10001", "9" * 5000, "1e3", "٣"])
def test_a_number_of_lines_that_is_none_is_refused_with_what_would_be_right(tmp_path: Path, lines: str) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        code, document = ask(path, "GET", f"/v1/logs?lines={lines.encode().hex() if not lines.isascii() else lines}")
    assert code == 400
    assert "a number from 1 to 10000 is needed" in document["error"]


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "forget"])
def test_a_request_reaches_the_daemon_with_the_uid_name_and_pid_of_who_asked(tmp_path: Path, verb: str) -> None:
    backend = SampleBackend()
    with daemon(tmp_path, backend) as path:
        assert ask(path, "POST", f"/v1/{verb}") == (200, {"accepted": True, "message": f"{verb} accepted"})
    name = pwd.getpwuid(os.getuid()).pw_name
    assert backend.asked == [(verb, f"uid {os.getuid()} ({name}), pid {os.getpid()}")]


def test_a_request_by_get_changes_nothing(tmp_path: Path) -> None:
    backend = SampleBackend()
    with daemon(tmp_path, backend) as path:
        code, document = ask(path, "GET", "/v1/stop")
    assert (code, document) == (405, {"error": "cannot GET '/v1/stop': only POST"})
    assert backend.asked == []


def test_a_refusal_is_a_409_in_the_daemons_words(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.refusal = "cannot stop: it is ending already"
    with daemon(tmp_path, backend) as path:
        assert ask(path, "POST", "/v1/stop") == (409, {"error": "cannot stop: it is ending already"})


def test_a_wrong_config_is_a_422_with_a_line_for_each_problem(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.problems = ["a.toml: one", "a.toml: two"]
    with daemon(tmp_path, backend) as path:
        answer = ask(path, "POST", "/v1/reload")
    assert answer == (422, {"error": "a.toml: one; a.toml: two", "problems": ["a.toml: one", "a.toml: two"]})


def test_an_unknown_path_is_a_404_with_a_reason(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        code, document = ask(path, "GET", "/v2/status")
    assert (code, document) == (404, {"error": "cannot GET '/v2/status': there is no such path"})


def test_a_body_over_the_limit_is_refused_and_asks_for_nothing(tmp_path: Path) -> None:
    backend = SampleBackend()
    with daemon(tmp_path, backend) as path:
        code, document = ask(path, "POST", "/v1/stop", b"x" * 100_000)
    assert code == 413
    assert "error" in document
    assert backend.asked == []


class FaultyBackend(SampleBackend):
    def engine_lines(self, count: int) -> tuple[str, ...]:
        raise ZeroDivisionError(f"secret detail {count}")


def test_a_fault_in_one_answer_is_a_500_without_detail_and_costs_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with daemon(tmp_path, FaultyBackend(SERVING)) as path:
        code, document = ask(path, "GET", "/v1/logs")
        assert ask(path, "GET", "/v1/status")[0] == 200
    assert code == 500
    assert "secret" not in document["error"]
    said = capfd.readouterr()
    assert "control.answer.failed" in said.out + said.err
    assert "ZeroDivisionError: secret detail" in said.out + said.err


def test_words_that_are_no_http_are_refused_and_the_next_client_is_served(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        with socket.socket(socket.AF_UNIX) as rude:
            rude.settimeout(DEADLINE_S)
            rude.connect(str(path))
            rude.sendall(b"\x00\x01 hello\r\n\r\n")
            assert b" 400 " in rude.recv(65536)
        assert ask(path, "GET", "/v1/status")[0] == 200


def test_the_socket_is_open_to_its_owner_and_group_only(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as path:
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert [entry.name for entry in tmp_path.iterdir()] == ["control.sock"]


async def _group_of_socket(runtime_dir: Path, group: str) -> int:
    async with serving(runtime_dir, SampleBackend(), group=group) as path:
        return path.stat().st_gid


def test_the_socket_is_given_to_its_group_where_that_is_allowed(tmp_path: Path) -> None:
    # Root may give to any group; anybody else to those they are in, of which the last differs from the default.
    others = [entry.gr_gid for entry in grp.getgrall()] if os.getuid() == 0 else os.getgroups()
    gid = others[-1]
    assert asyncio.run(_group_of_socket(tmp_path, grp.getgrgid(gid).gr_name)) == gid


def test_without_the_group_the_socket_stays_with_the_daemons_own(tmp_path: Path) -> None:
    assert asyncio.run(_group_of_socket(tmp_path, "no-such-group-here")) == tmp_path.stat().st_gid


def test_the_socket_of_a_dead_daemon_is_replaced_and_ours_is_removed_at_the_end(tmp_path: Path) -> None:
    for name in ("control.sock", "control.sock.new"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    with daemon(tmp_path, SampleBackend()) as path:
        assert ask(path, "GET", "/v1/status")[0] == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("folder", "why"), [("missing", "No such file"), ("x" * 120, "AF_UNIX path too long")])
def test_a_folder_that_cannot_take_a_socket_is_named_with_the_reason(tmp_path: Path, folder: str, why: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on '{tmp_path}/{folder}/control.sock': {why}"):
        asyncio.run(_group_of_socket(tmp_path / folder, "no-such-group-here"))


def test_an_end_does_not_wait_for_clients_that_keep_their_connection(tmp_path: Path) -> None:
    idle = threading.Event()
    with daemon(tmp_path, SampleBackend()) as path:
        connection = Connection(path)
        connection.request("GET", "/v1/status")
        assert connection.getresponse().read()
        idle.set()
    # daemon() has joined its thread within the deadline, or the next server could not be told from the old one
    assert idle.is_set()
    assert not path.exists()
    connection.close()


def test_clients_that_never_finish_a_request_are_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "LONGEST_S", 0.1)
    with daemon(tmp_path, SampleBackend()) as path:
        for words in (b"", b"GET /v1/sta", b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"):
            with socket.socket(socket.AF_UNIX) as slow:
                slow.settimeout(DEADLINE_S)
                slow.connect(str(path))
                slow.sendall(words)
                assert slow.recv(65536) == b""
        assert ask(path, "GET", "/v1/status")[0] == 200


class BusyBackend(SampleBackend):
    """Holds up its loop until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def status(self) -> Status:
        assert self.go_on.wait(DEADLINE_S)
        return super().status()


def test_hundreds_that_connect_while_the_loop_is_busy_are_all_answered(tmp_path: Path) -> None:
    backend = BusyBackend()
    with daemon(tmp_path, backend) as path, ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]
        try:
            for client in clients:
                client.setblocking(False)  # a full queue would be an error at once
                client.connect(str(path))
                client.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        finally:
            backend.go_on.set()
        for client in clients:
            client.settimeout(DEADLINE_S)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("uid", "admins", "status"), [(0, "root", 200), (65534, "root", 403), (65534, "no-such-group", 403)]
)
def test_who_may_look_may_not_change_anything_unless_root_or_an_admin(
    tmp_path: Path, uid: int, admins: str, status: int
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can connect as somebody else")
    backend = SampleBackend()
    assert asyncio.run(_asked_as(uid, tmp_path, backend, admins)) == (200, status)
    assert len(backend.asked) == (status == 200)


def test_members_of_the_admins_group_may_change_things(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can connect as somebody else")
    somebody = pwd.getpwnam("nobody")
    backend = SampleBackend()
    group = grp.getgrgid(somebody.pw_gid).gr_name
    assert asyncio.run(_asked_as(somebody.pw_uid, tmp_path, backend, group)) == (200, 200)
    ((verb, by),) = backend.asked
    assert (verb, by.startswith(f"uid {somebody.pw_uid} (nobody), pid ")) == ("stop", True)


ASKS = """
import http.client, os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
for method, target in (("GET", "/v1/status"), ("POST", "/v1/stop")):
    client = http.client.HTTPConnection("localhost", timeout=60)
    client.sock = socket.socket(socket.AF_UNIX)
    client.sock.connect(sys.argv[1])
    client.request(method, target)
    print(client.getresponse().status)
"""


async def _asked_as(uid: int, runtime_dir: Path, backend: SampleBackend, admins: str) -> tuple[int, ...]:
    """The HTTP statuses that this user has of a question and of a request."""
    async with serving(runtime_dir, backend, admins=admins) as path:
        await asyncio.to_thread(path.chmod, 0o666)
        await asyncio.to_thread(runtime_dir.chmod, 0o711)
        # From within: the folders above are root's alone.
        argv = (sys.executable, "-c", ASKS, path.name, str(uid))
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, cwd=runtime_dir)
        out, _ = await process.communicate()
        return tuple(map(int, out.split()))
