from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mgpu_llm.control_api import status_to_json
from mgpu_llm.ctl import client as client_module
from mgpu_llm.ctl import exits, layout
from mgpu_llm.ctl import main as main_module
from mgpu_llm.ctl.client import Client, Failure
from tests.ctl.daemons import (
    DEADLINE_S,
    SampleBackend,
    command,
    daemon,
    environment,
    foreign,
    http_reply,
    mgpuctl,
    says,
    wait_for,
)
from tests.ctl.samples import HEALTHY, STARTING

VERBS = ("status", "attempts", "ladder", "logs", "start", "stop", "restart")
#: Those that know what to do without a daemon, too.
MORE_VERBS = ("plan", "forget")


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == ""
    assert done.stderr.startswith("mgpuctl: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_daemon_every_verb_says_how_to_start_it(tmp_path: Path, verb: str) -> None:
    done = mgpuctl(tmp_path / "s", verb)
    assert done.returncode == 3
    assert one_line(done) == (
        f"mgpuctl: no daemon answers on {tmp_path / 's'}; start it with: systemctl start mgpu-llm\n"
    )


def test_the_default_socket_is_the_one_of_the_service() -> None:
    done = subprocess.run(command("--help"), env=environment(), capture_output=True, text=True, check=True, timeout=60)
    assert "/run/mgpu-llm/control.sock" in done.stdout


def test_the_socket_that_a_killed_daemon_left_counts_as_no_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    assert mgpuctl(tmp_path / "s", "status").returncode == 3


@pytest.mark.parametrize("path", ["file", "file/s", "x" * 200])
def test_a_path_that_can_be_no_socket_is_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    done = mgpuctl(tmp_path / path, "status")
    assert done.returncode in (3, 5)
    one_line(done)


def test_without_the_right_to_the_socket_the_group_is_named(tmp_path: Path) -> None:
    # Whoever runs the tests as root becomes nobody, after the imports: nobody may not read root's Python.
    script = (
        "import os, sys, mgpu_llm.ctl.status; from mgpu_llm.ctl.main import main\n"
        "os.getuid() or os.setuid(65534)\nsys.exit(main())"
    )
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path:
        socket_path.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", script, "--socket", str(socket_path), "status"],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 4
    assert "usermod -aG mgpu-llm USER" in one_line(done)


def test_a_daemon_that_does_not_answer_is_given_up_after_5_s(tmp_path: Path) -> None:
    silent = threading.Event()

    def hold(_: socket.socket) -> None:
        silent.wait(DEADLINE_S)

    with foreign(tmp_path / "s", hold) as socket_path:
        done = mgpuctl(socket_path, "status")
        silent.set()
    assert done.returncode == 5
    assert "does not answer within 5 s" in one_line(done)


def test_an_answer_that_comes_byte_by_byte_is_given_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_S", 0.5)
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not over.wait(0.05):
            connection.sendall(b" ")

    with foreign(tmp_path / "s", drip) as socket_path:
        with pytest.raises(Failure) as caught:
            Client(str(socket_path)).status_document()
        over.set()
    assert caught.value.code == exits.NO_ANSWER
    assert "does not answer within 0.5 s" in caught.value.message


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\xff" * 40_000,
        http_reply(b"<html>It works!</html>"),
        http_reply(b"<html>Not found</html>", "404 Not Found"),
        http_reply(b"\xff\xfe"),
        http_reply(b"[1, 2]"),
        http_reply(b"{}"),
        http_reply(b'{"state": "ready"'),
        http_reply(json.dumps({**status_to_json(HEALTHY), "gpus": 3}).encode()),
        http_reply(json.dumps({**status_to_json(HEALTHY), "elapsed_s": "soon"}).encode()),
        http_reply(json.dumps({**status_to_json(STARTING), "shards": {"done": 1}}).encode()),
        http_reply(json.dumps({**status_to_json(STARTING), "attempts": [{"number": 1}]}).encode()),
        http_reply(b"[" * 100_000),
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    ],
)
def test_what_is_no_mgpud_or_talks_nonsense_is_one_line_and_exit_5(tmp_path: Path, reply: bytes) -> None:
    with foreign(tmp_path / "s", says(reply)) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert done.returncode == 5
    one_line(done)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("words", [["status"], ["status", "--json"]], ids=" ".join)
def test_what_is_no_number_is_nonsense_and_not_passed_on(tmp_path: Path, number: str, words: list[str]) -> None:
    body = json.dumps({**status_to_json(HEALTHY), "elapsed_s": "soon"}).replace('"soon"', number)
    with foreign(tmp_path / "s", says(http_reply(body.encode()))) as socket_path:
        done = mgpuctl(socket_path, *words)
    assert done.returncode == 5
    assert "does not speak as mgpud does" in one_line(done)


def test_a_number_too_large_to_be_told_is_nonsense(tmp_path: Path) -> None:
    document = status_to_json(HEALTHY)
    body = json.dumps({**document, "gpus": [{**document["gpus"][0], "used_bytes": 10**400}]})
    with foreign(tmp_path / "s", says(http_reply(body.encode()))) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert done.returncode == 5
    assert "OverflowError" in one_line(done)


@pytest.mark.parametrize("verb", [*VERBS[1:], *MORE_VERBS])
def test_every_verb_takes_an_empty_answer_for_nonsense(tmp_path: Path, verb: str) -> None:
    with foreign(tmp_path / "s", says(http_reply(b"{}"))) as socket_path:
        done = mgpuctl(socket_path, verb)
    assert done.returncode == 5
    one_line(done)


def test_a_reader_that_leaves_early_ends_mgpuctl_without_a_word(tmp_path: Path) -> None:
    backend = SampleBackend(HEALTHY)
    backend.lines = tuple(f"line {n} {'x' * 100}" for n in range(10_000))
    with daemon(tmp_path, backend) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "logs", "-n", "10000"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert ctl.stdout
        assert ctl.stderr
        with ctl.stdout, ctl.stderr:
            assert ctl.stdout.readline().startswith(b"line 0 ")
            ctl.stdout.close()
            complaints = ctl.stderr.read()
        assert (ctl.wait(DEADLINE_S), complaints) == (141, b"")


def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path, Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
    assert (done.returncode, done.stderr) == (8, "mgpuctl: cannot write the result: No space left on device\n")


def test_ctrl_c_while_the_daemon_is_silent_shows_no_traceback(tmp_path: Path) -> None:
    reached, silent = threading.Event(), threading.Event()

    def hold(connection: socket.socket) -> None:
        connection.recv(65536)
        reached.set()
        silent.wait(DEADLINE_S)

    with foreign(tmp_path / "s", hold) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "status"), env=environment(), stderr=subprocess.PIPE, text=True
        )
        wait_for(reached.is_set, "the request")
        ctl.send_signal(signal.SIGINT)
        _, complaints = ctl.communicate(timeout=DEADLINE_S)
        silent.set()
    assert ctl.returncode == 130
    assert complaints.strip() == ""


def test_what_the_daemon_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    backend = SampleBackend(HEALTHY)
    backend.refusal = "cannot start the engine: the daemon is ending"
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "start")
    assert done.returncode == 8
    assert one_line(done) == "mgpuctl: cannot start the engine: the daemon is ending\n"


def test_a_fault_of_mgpuctl_itself_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> list[str]:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("mgpu_llm.ctl.attempts.attempts_lines", broken)
    monkeypatch.setattr(main_module, "_drop_stdout", lambda: None)
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path:
        monkeypatch.setattr(sys, "argv", ["mgpuctl", "--socket", os.fspath(socket_path), "attempts"])
        assert main_module.main() == 70
    assert capfd.readouterr().err == (
        "mgpuctl: a fault in mgpuctl itself: ZeroDivisionError: by zero; please report it\n"
    )
    assert layout.attempts_lines is not broken


def test_a_mistyped_verb_is_answered_with_the_right_one(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "statsu")
    assert done.returncode == 2
    assert "no verb 'statsu'; did you mean 'status'?" in done.stderr
    assert "there are status, attempts" in mgpuctl(tmp_path / "s", "xyzzy").stderr


@pytest.mark.parametrize("count", ["0", "-3", "many", "10001"])
def test_a_wrong_number_of_lines_is_a_usage_error(tmp_path: Path, count: str) -> None:
    assert mgpuctl(tmp_path / "s", "logs", "-n", count).returncode == 2


def test_help_lists_every_verb_and_every_exit_code(tmp_path: Path) -> None:
    text = mgpuctl(tmp_path / "s", "--help").stdout
    assert all(f"\n  {verb} " in text for verb in VERBS + MORE_VERBS)
    assert all(f"\n    {code}  " in text for code in range(9))


@pytest.mark.parametrize("verb", VERBS + MORE_VERBS)
def test_each_verb_explains_itself_without_a_daemon(tmp_path: Path, verb: str) -> None:
    done = mgpuctl(tmp_path / "s", verb, "--help")
    assert done.returncode == 0
    assert f"mgpuctl {verb}" in done.stdout


def test_a_daemon_whose_queue_is_full_does_not_answer(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(tmp_path / "s"))
        busy.listen(0)
        first.connect(str(tmp_path / "s"))
        done = mgpuctl(tmp_path / "s", "status")
    assert done.returncode == exits.NO_ANSWER
    assert "does not answer" in one_line(done)
