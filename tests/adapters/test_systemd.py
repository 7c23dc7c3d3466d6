from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from mgpu_llm.adapters.systemd import STATUS_CHARACTERS, SystemdNotifier, watchdog_interval_s


class Manager:
    """The end of the notify socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(30)

    def received(self) -> str:
        return self._socket.recv(65536).decode("utf-8", "strict")

    def nothing_more(self) -> bool:
        """Datagrams are there when send() returns, so an empty queue stays empty."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(65536)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(30)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@mgpu-llm-{secrets.token_hex(8)}"
    made = Manager(address)
    yield made
    made.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[SystemdNotifier]:
    made = SystemdNotifier(manager.environ)
    yield made
    made.close()


def test_each_message_is_in_systemds_words(manager: Manager, notifier: SystemdNotifier) -> None:
    notifier.ready()
    notifier.status("loading weights, 3/8 shards")
    notifier.extend_timeout(1.5)
    notifier.watchdog()
    notifier.stopping()
    assert [manager.received() for _ in range(5)] == [
        "READY=1",
        "STATUS=loading weights, 3/8 shards",
        "EXTEND_TIMEOUT_USEC=1500000",
        "WATCHDOG=1",
        "STOPPING=1",
    ]


def test_a_status_is_sent_only_when_it_has_changed(manager: Manager, notifier: SystemdNotifier) -> None:
    for text in ("boot", "boot", "weights", "weights", "boot"):
        notifier.status(text)
    assert [manager.received() for _ in range(3)] == ["STATUS=boot", "STATUS=weights", "STATUS=boot"]
    assert manager.nothing_more()


def test_a_status_is_one_bounded_line_and_can_smuggle_no_other_message(
    manager: Manager, notifier: SystemdNotifier
) -> None:
    notifier.status("first\nREADY=1\r\n  second")
    notifier.status("€" * 10_000)
    assert manager.received() == "STATUS=first READY=1 second"
    long = manager.received()
    assert long == "STATUS=" + "€" * (STATUS_CHARACTERS - 1) + "…"
    assert len(long.encode()) < 4096


def test_a_status_beyond_latin_1_arrives_as_utf_8(manager: Manager, notifier: SystemdNotifier) -> None:
    notifier.status("modèle 模型 \ud800")
    assert manager.received() == "STATUS=modèle 模型 ?"


def test_an_extension_is_never_zero(manager: Manager, notifier: SystemdNotifier) -> None:
    notifier.extend_timeout(0)
    assert manager.received() == "EXTEND_TIMEOUT_USEC=1"


def test_the_environment_is_as_it_was(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    SystemdNotifier(manager.environ).close()
    assert "NOTIFY_SOCKET" not in os.environ
    monkeypatch.setenv("NOTIFY_SOCKET", "/another")
    SystemdNotifier(manager.environ).close()
    assert os.environ["NOTIFY_SOCKET"] == "/another"


def test_without_systemd_everything_is_a_no_op() -> None:
    with structlog.testing.capture_logs() as logs:
        notifier = SystemdNotifier({})
        notifier.ready()
        notifier.status("boot")
        notifier.extend_timeout(1)
        notifier.watchdog()
        notifier.stopping()
        notifier.close()
    assert (notifier.connected, logs) == (False, [])


# sdnotify drops its socket unclosed when it cannot connect.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_nobody_listens_on_is_warned_of_and_not_fatal(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        notifier = SystemdNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
        notifier.ready()
    assert not notifier.connected
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("systemd.unreachable", "warning")]


def test_a_systemd_that_goes_away_is_warned_of_once_and_a_lost_status_is_sent_again(tmp_path: Path) -> None:
    first = Manager(str(tmp_path / "notify"))
    notifier = SystemdNotifier(first.environ)
    first.close()
    with structlog.testing.capture_logs() as logs:
        notifier.status("weights")
        notifier.watchdog()
        notifier.status("weights")
    notifier.close()
    assert [entry["event"] for entry in logs] == ["systemd.notify.failed"]
    assert logs[0]["message"] == "STATUS=weights"


def test_a_systemd_that_does_not_read_holds_nobody_up_for_ever(manager: Manager, notifier: SystemdNotifier) -> None:
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    with structlog.testing.capture_logs() as logs:
        for _ in range(limit + 2):
            notifier.watchdog()
    assert [entry["event"] for entry in logs] == ["systemd.notify.failed"]
    assert manager.received() == "WATCHDOG=1"


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time_and_only_if_it_is_ours(
    environ: dict[str, str], interval_s: float | None
) -> None:
    assert watchdog_interval_s(environ) == interval_s
