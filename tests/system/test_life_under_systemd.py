"""The unit under a real systemd when something goes wrong with the daemon itself, and when somebody stops it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.booted_systemd import BootedSystemd
from tests.support.fake_setup import MODEL, FakeSetup
from tests.support.toy_setup import free_port
from tests.system.units import PROGRAMS, lay, wait_for

pytestmark = pytest.mark.system
UNIT = "mgpu-llm.service"
#: What the unit gives the daemon's folders.
FROM_THE_UNIT = ("daemon.runtime_dir", "daemon.state_dir", "gpus.lock_dirs")
LIMIT_S = 120.0


@pytest.fixture
def host(booted: BootedSystemd) -> Iterator[BootedSystemd]:
    """The unit with short times, for which nobody has to wait."""
    booted.write("/srv/model/config.json", json.dumps(MODEL))
    short = "[Service]\nTimeoutStartSec=4\nWatchdogSec=3\nTimeoutAbortSec=2\nRestartSec=100ms\n"
    booted.write(f"/etc/systemd/system/{UNIT}.d/short.conf", short)
    lay(booted)
    yield booted
    booted.run("systemctl", "stop", "mgpu-llm")
    booted.run("systemctl", "reset-failed", "mgpu-llm")
    assert left(booted) == [], "nothing is left of any of them"


def configure(host: BootedSystemd, scenario: str = "", **settings: object) -> None:
    setup = FakeSetup(
        folder=Path("/srv"),
        port=free_port(),
        scenario=scenario,
        settings={**{key.replace("__", "."): value for key, value in settings.items()}, **dict.fromkeys(FROM_THE_UNIT)},
    )
    host.write("/etc/mgpu-llm/mgpu-llm.toml", setup.toml())


def left(host: BootedSystemd) -> list[str]:
    """What the service's user has running, and what lies in shared memory."""
    running = host.run("pgrep", "--list-name", "-u", "mgpu-llm").stdout.splitlines()
    return [*running, *host.must("ls", "/dev/shm").splitlines()]


def engine(host: BootedSystemd) -> set[str]:
    """The processes of engines that live."""
    return set(host.run("pgrep", "-f", "fake_engine.py serve").stdout.split())


def show(host: BootedSystemd, what: str) -> str:
    return host.show(UNIT, what)[what]


def status(host: BootedSystemd) -> dict[str, Any]:
    """What mgpuctl says; nothing where no daemon answers."""
    said = host.run(str(PROGRAMS / "mgpuctl"), "status", "--json").stdout
    return dict(json.loads(said)) if said else {}


def comes_back_after(host: BootedSystemd, signal: str) -> None:
    """The daemon gets the signal, and systemd begins it anew: with one engine, of which nothing was there before."""
    before = engine(host)
    host.must("kill", signal, show(host, "MainPID"))
    wait_for(lambda: show(host, "NRestarts") == "1" and show(host, "SubState") == "running")
    after = engine(host)
    assert (len(after), after & before) == (len(before), set())


def test_a_load_that_moves_may_take_longer_than_the_start_timeout(host: BootedSystemd) -> None:
    configure(host, "load_s=8")
    assert host.run("systemctl", "start", "mgpu-llm", timeout_s=LIMIT_S).returncode == 0
    took_us = int(show(host, "ActiveEnterTimestampMonotonic")) - int(show(host, "InactiveExitTimestampMonotonic"))
    assert took_us > 6_000_000, "or it proves nothing"
    assert show(host, "NRestarts") == "0"


def test_a_daemon_that_stands_still_is_ended_by_the_watchdog_with_its_engine_and_begun_anew(
    host: BootedSystemd,
) -> None:
    configure(host)
    host.must("systemctl", "start", "mgpu-llm")
    comes_back_after(host, "-STOP")
    assert "watchdog" in host.journal("mgpu-llm").lower()


def test_a_daemon_that_is_killed_comes_back_with_one_engine_and_without_the_old_one(host: BootedSystemd) -> None:
    configure(host)
    host.must("systemctl", "start", "mgpu-llm")
    comes_back_after(host, "-KILL")
    assert status(host)["state"] == "ready"


@pytest.mark.parametrize("scenario", ["hang-init; ignore-sigterm", ""])
def test_a_stop_during_the_load_or_while_it_serves_is_no_timeout_and_leaves_nothing(
    host: BootedSystemd, scenario: str
) -> None:
    configure(host, scenario, stop__grace=1)
    host.must("systemctl", "start", "--no-block", "mgpu-llm")
    phase = "distributed-init" if scenario else "serving"
    wait_for(lambda: bool(engine(host)) and status(host).get("phase") == phase)
    host.must("systemctl", "stop", "mgpu-llm")
    assert (show(host, "ActiveState"), show(host, "Result")) == ("inactive", "success")
    assert left(host) == []


def test_a_config_that_is_hopeless_ends_the_start_at_once_and_status_says_why(host: BootedSystemd) -> None:
    configure(host, "bad-flag")
    assert host.run("systemctl", "start", "mgpu-llm").returncode != 0
    assert (show(host, "SubState"), show(host, "ExecMainStatus"), show(host, "NRestarts")) == ("failed", "65", "0")
    assert "vLLM refused its arguments" in host.run("systemctl", "status", "--no-pager", "mgpu-llm").stdout


def test_leaving_multi_user_as_a_shutdown_does_ends_the_service_in_order_and_leaves_nothing(
    host: BootedSystemd,
) -> None:
    configure(host)
    host.must("systemctl", "start", "mgpu-llm")
    # A target of our own: rescue.target opens a console, which here is the host's /dev/null, and would take it for a terminal.
    host.write("/run/systemd/system/less.target", "[Unit]\nRequires=basic.target\nAllowIsolate=yes\n")
    host.must("systemctl", "daemon-reload")
    host.must("systemctl", "isolate", "--no-block", "less.target")
    wait_for(lambda: show(host, "ActiveState") == "inactive")
    assert show(host, "Result") == "success"
    assert left(host) == []
