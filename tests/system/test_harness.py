"""The booted systemd is a real one: what mgpu-llm.service relies on works in it, and nothing of it stays behind.

The services here behave as mgpud does towards systemd, and use nothing of mgpud.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.booted_systemd import CHECKOUT, BootedSystemd, CannotBootError, booted_systemd

pytestmark = pytest.mark.system
T = TypeVar("T")

_SERVICE = r"""
import os, pathlib, socket, subprocess, sys, time

def notify(*lines):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto("\n".join(lines).encode(), os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))

def wait_for(order):
    while not pathlib.Path(os.environ["RUNTIME_DIRECTORY"], order).exists():
        time.sleep(0.05)
        yield

def when_told():
    notify("STATUS=loading 3 of 8")
    for _ in wait_for("go"):
        pass

def extending():
    notify("EXTEND_TIMEOUT_USEC=60000000")
    time.sleep(3.5)

def watched():
    notify("READY=1")
    for _ in wait_for("freeze"):
        notify("WATCHDOG=1")
    notify("STATUS=frozen")
    time.sleep(600)

def supervising():
    own = next(line[3:].strip() for line in open("/proc/self/cgroup") if line.startswith("0::"))
    engine = pathlib.Path("/sys/fs/cgroup" + own, "engine-1")
    engine.mkdir()
    stubborn = "trap '' TERM; setsid sh -c 'sleep 600' & echo $$ >$0/cgroup.procs; setsid sh -c 'sleep 600' & sleep 600"
    child = subprocess.Popen(["sh", "-c", stubborn, str(engine)], start_new_session=True)
    while len((engine / "cgroup.procs").read_text().split()) < 3:
        time.sleep(0.05)
    notify("READY=1", f"STATUS=engine is {child.pid}")
    for _ in wait_for("kill"):
        pass
    (engine / "cgroup.kill").write_text("1")
    status = child.wait()
    while "populated 1" in (engine / "cgroup.events").read_text():
        time.sleep(0.05)
    engine.rmdir()
    notify(f"STATUS=engine ended with {status}")
    time.sleep(600)

globals()[sys.argv[1]]()
notify("READY=1")
time.sleep(600)
"""


def eventually(what: Callable[[], T], wanted: Callable[[T], bool], timeout_s: float = 60.0) -> T:
    """Polls `what` until it is `wanted`; gives the last value at the deadline, for the caller's assert to show."""
    deadline = time.monotonic() + timeout_s
    while not wanted(value := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def install_service(booted: BootedSystemd, name: str, *settings: str) -> None:
    """A unit `name` that runs the function `name` of the service above, as an ordinary user."""
    booted.write("/usr/local/lib/harness/service.py", _SERVICE)
    lines = [
        "[Service]",
        "Type=notify",
        f"ExecStart={sys.executable} /usr/local/lib/harness/service.py {name}",
        "User=daemon",
        f"RuntimeDirectory={name}",
        *settings,
    ]
    booted.write(f"/etc/systemd/system/{name}.service", "\n".join(lines))
    booted.must("systemctl", "daemon-reload")


def test_start_blocks_until_the_service_says_ready_and_status_shows_what_it_says(booted: BootedSystemd) -> None:
    install_service(booted, "when_told")
    booted.must("systemctl", "start", "--no-block", "when_told")
    seen = eventually(
        lambda: booted.show("when_told", "ActiveState", "StatusText"), lambda shown: shown["StatusText"] != ""
    )
    assert seen == {"ActiveState": "activating", "StatusText": "loading 3 of 8"}
    assert "loading 3 of 8" in booted.run("systemctl", "status", "when_told").stdout
    booted.write("/run/when_told/go", "")
    booted.must("systemctl", "start", "when_told")
    assert booted.show("when_told", "ActiveState") == {"ActiveState": "active"}
    assert "Started when_told.service" in booted.journal("when_told")
    booted.must("systemctl", "stop", "when_told")
    assert not (booted.root / "run/when_told").exists()


def test_a_start_that_asks_for_more_time_may_take_longer_than_its_timeout(booted: BootedSystemd) -> None:
    install_service(booted, "extending", "TimeoutStartSec=3")
    booted.must("systemctl", "start", "extending")
    assert booted.show("extending", "ActiveState") == {"ActiveState": "active"}


def test_a_start_that_does_not_ask_for_more_time_ends_at_its_timeout(booted: BootedSystemd) -> None:
    install_service(booted, "when_told", "TimeoutStartSec=2")
    assert booted.run("systemctl", "start", "when_told").returncode != 0
    assert booted.show("when_told", "ActiveState", "Result") == {"ActiveState": "failed", "Result": "timeout"}


def test_the_watchdog_spares_a_service_that_speaks_and_ends_one_that_falls_silent(booted: BootedSystemd) -> None:
    install_service(booted, "watched", "WatchdogSec=3")
    booted.must("systemctl", "start", "watched")
    started_us = int(booted.show("watched", "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])
    eventually(lambda: time.clock_gettime(time.CLOCK_MONOTONIC), lambda now: now > started_us / 1e6 + 4)
    assert booted.show("watched", "ActiveState") == {"ActiveState": "active"}
    booted.write("/run/watched/freeze", "")
    seen = eventually(lambda: booted.show("watched", "Result"), lambda shown: shown["Result"] != "success")
    assert seen == {"Result": "watchdog"}


def test_a_service_ends_a_cgroup_of_its_own_with_all_that_ignores_signals_and_lives_on(booted: BootedSystemd) -> None:
    install_service(booted, "supervising", "Delegate=yes", "KillMode=mixed")
    booted.must("systemctl", "start", "supervising")
    cgroup = booted.cgroup / "system.slice/supervising.service"
    assert len((cgroup / "engine-1/cgroup.procs").read_text().split()) >= 3
    before = booted.show("supervising", "StatusText")
    booted.write("/run/supervising/kill", "")
    seen = eventually(lambda: booted.show("supervising", "StatusText"), lambda shown: shown != before)
    assert seen == {"StatusText": f"engine ended with -{signal.SIGKILL.value}"}
    assert not (cgroup / "engine-1").exists()
    # One process of the unit was started before it entered the engine's cgroup: that one is systemd's to end.
    assert len((cgroup / "cgroup.procs").read_text().split()) >= 2
    booted.must("systemctl", "stop", "supervising")
    assert not cgroup.exists()
    assert booted.show("supervising", "Result") == {"Result": "success"}


def test_the_checkout_and_its_python_can_be_read_by_every_user_inside(booted: BootedSystemd) -> None:
    as_user = ("setpriv", "--reuid=daemon", "--regid=daemon", "--clear-groups")
    assert "pyproject.toml" in booted.must(*as_user, "ls", str(CHECKOUT))
    assert booted.must(*as_user, sys.executable, "-c", "print('runs')") == "runs\n"


def test_dev_shm_is_private_and_takes_gigabytes(booted: BootedSystemd) -> None:
    booted.write("/dev/shm/psm_harness", "")
    assert not Path("/dev/shm/psm_harness").exists()
    size_kib = booted.must("df", "--output=size", "/dev/shm").split()[-1]
    assert int(size_kib) >= 4 << 20


def test_a_command_inside_dies_at_its_timeout(booted: BootedSystemd) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        booted.run("sleep", "86399", timeout_s=0.5)
    assert eventually(lambda: booted.run("pgrep", "-f", "sleep 86399").returncode, lambda code: code != 0) == 1


def leftovers(cgroup: Path, pid: int) -> list[str]:
    """What of a boot is still there: its cgroup, its PID 1, its directory, its mounts."""
    found = [
        str(path) for path in (cgroup, Path(f"/proc/{pid}"), Path(tempfile.gettempdir(), cgroup.name)) if path.exists()
    ]
    return found + [line for line in Path("/proc/mounts").read_text().splitlines() if cgroup.name in line]


def test_nothing_is_left_when_the_test_ends() -> None:
    with booted_systemd() as system:
        system.must("systemd-run", "--unit=survivor", "setsid", "sleep", "600")
        assert "survivor" in leftovers_inside(system)
        assert leftovers(system.cgroup, system.pid)
    assert leftovers(system.cgroup, system.pid) == []


def leftovers_inside(system: BootedSystemd) -> str:
    return " ".join(path.name for path in (system.cgroup / "system.slice").iterdir())


def test_nothing_is_left_when_the_test_is_killed() -> None:
    script = (
        "import signal; from tests.support.booted_systemd import booted_systemd as boot\n"
        "with boot() as system: print(system.cgroup, system.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        cgroup, pid = test.stdout.readline().split()
        assert leftovers(Path(cgroup), int(pid))
        test.kill()
    assert eventually(lambda: leftovers(Path(cgroup), int(pid)), lambda found: not found) == []


def test_without_root_the_refusal_says_so() -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(CannotBootError, match="it needs root"), booted_systemd():
            pass
    finally:
        os.seteuid(0)
