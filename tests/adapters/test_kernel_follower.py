"""The kernel's messages as they come, from a pipe that stands in for /dev/kmsg and from programs named journalctl."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mgpu_llm.adapters.host import kernel_follower
from mgpu_llm.adapters.host.kernel_follower import BURST, LINES_PER_S, Followed, follow
from mgpu_llm.adapters.host.program import Unanswered

XID = "NVRM: Xid (PCI:0000:17:00): 79, pid=1234, name=python3, GPU has fallen off the bus."
PCIE = "pcieport 0000:16:01.0: AER: Corrected error received: 0000:17:00.0"
LIMIT_S = 30.0


def tells(line: str) -> bool:
    return "Xid" in line


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Kernel:
    """The other end of what stands in for /dev/kmsg, and what is followed."""

    followed: Followed
    clock: Clock
    write_fd: int
    number: int = 0

    def say(self, text: str, priority: int = 4, fields: str = "") -> None:
        """One record, as the kernel writes them."""
        self.number += 1
        self.write(f"{priority},{self.number},{self.number}000,-;{text}\n{fields}".encode())

    def write(self, record: bytes) -> None:
        os.write(self.write_fd, record)


@contextmanager
def kernel() -> Iterator[Kernel]:
    """A pipe of packets: as of /dev/kmsg, a read gives one record."""
    read_fd, write_fd = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    clock = Clock()
    said = Kernel(follow(clock, tells, Path(f"/proc/self/fd/{read_fd}")), clock, write_fd)
    try:
        yield said
    finally:
        said.followed.close()
        os.close(read_fd)
        os.close(write_fd)


def test_a_line_that_matters_is_heard_and_one_of_everyday_is_not() -> None:
    with kernel() as said:
        assert said.followed.heard() == ()
        said.say(XID, fields=" SUBSYSTEM=pci\n DEVICE=+pci:0000:17:00.0; Xid\n")
        said.say("usb 1-1: new high-speed USB device number 2 using xhci_hcd")
        said.say(" oom_kill_process.cold+0x8/0x8a")
        said.say(PCIE, priority=3)
        assert select.select([said.followed], [], [], 0)[0] == [said.followed]
        assert said.followed.heard() == (XID, PCIE)
        assert said.followed.heard() == ()
        assert said.followed.ended == ""


def test_what_a_program_has_written_into_the_buffer_is_not_the_kernels_word() -> None:
    with kernel() as said:
        said.say(f"mgpud[71]: the kernel said: {XID}", priority=12)
        for strange in (XID, f"x,1,2,-;{XID}", f";{XID}", f"-1,1,2,-;{XID}"):
            said.write(strange.encode())
        said.write(b"4,5,6,-;nvidia \xff\n")
        assert said.followed.heard() == ("nvidia \ufffd",)


def test_a_line_has_an_end() -> None:
    with kernel() as said:
        said.say(f"NVRM: {'x' * 3000}")
        assert [len(line) for line in said.followed.heard()] == [1000]


def test_of_a_flood_a_bounded_number_of_lines_is_handed_on_and_more_as_time_goes_by() -> None:
    with kernel() as said:
        heard = list[str]()
        for _ in range(5):
            for _ in range(100):
                said.say(PCIE)
            heard += said.followed.heard()
        assert len(heard) == BURST
        said.clock.now += 2.5 / LINES_PER_S
        for _ in range(9):
            said.say(PCIE)
        assert len(said.followed.heard()) == 2
        said.clock.now += 1e9
        for _ in range(3):
            for _ in range(100):
                said.say(PCIE)
            heard += said.followed.heard()
        assert len(heard) == 2 * BURST


def test_a_flood_hides_no_line_that_names_a_cause_and_those_have_a_bound_too() -> None:
    with kernel() as said:
        for _ in range(200):
            said.say(PCIE)
        said.followed.heard()
        heard = list[str]()
        for _ in range(2):
            for _ in range(BURST):
                said.say(PCIE)
                said.say(XID)
            heard += said.followed.heard()
        assert heard == [XID] * BURST


def test_one_reading_takes_no_more_than_a_bounded_number_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_follower, "RECORDS_AT_ONCE", 3)
    with kernel() as said:
        for _ in range(8):
            said.say(XID)
        readings = [(len(said.followed.heard()), said.followed.more) for _ in range(4)]
        assert readings == [(3, True), (3, True), (2, False), (0, False)]


def test_records_that_were_overwritten_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel() as said:
        said.say(XID)
        read, refusals = os.read, iter([errno.EPIPE, errno.EPIPE])

        def overtaken(descriptor: int, size: int) -> bytes:
            if number := next(refusals, 0):
                raise OSError(number, os.strerror(number))
            return read(descriptor, size)

        monkeypatch.setattr("os.read", overtaken)
        assert said.followed.heard() == (XID,)
        assert said.followed.ended == ""
        refusals = iter([errno.EPIPE] * 10)
        said.say(XID)
        assert said.followed.heard() == (), "a kernel that is always faster must not hold the loop"
        assert said.followed.heard() == (XID,)


def test_one_that_cannot_be_read_any_more_has_ended_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel() as said:

        def refused(descriptor: int, size: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr("os.read", refused)
            assert said.followed.heard() == ()
        assert said.followed.ended == "cannot read what the kernel says: input/output error"
        said.say(XID)
        assert said.followed.heard() == ()


def test_where_this_host_lets_us_only_what_is_said_from_now_on_is_heard() -> None:
    try:
        followed = follow(time.monotonic, tells)
    except Unanswered as silence:
        pytest.skip(str(silence))
    try:
        assert len(followed.heard()) < 20  # a kernel's buffer has hundreds
        assert followed.ended == ""
    finally:
        followed.close()


def test_what_the_kernel_of_this_host_says_of_a_process_is_heard() -> None:
    told = Path("/proc/sys/debug/exception-trace")
    if os.uname().machine != "x86_64" or not told.exists() or told.read_text().strip() == "0":
        pytest.skip("this kernel does not tell of a segfault")
    try:
        followed = follow(time.monotonic, tells)
    except Unanswered as silence:
        pytest.skip(str(silence))
    heard: tuple[str, ...] = ()
    deadline = time.monotonic() + LIMIT_S
    while not any(line.startswith("python") and "segfault at 0 " in line for line in heard):
        assert time.monotonic() < deadline
        subprocess.run([sys.executable, "-S", "-c", "import ctypes; ctypes.string_at(0)"])
        while select.select([followed], [], [], 0.5)[0]:
            heard += followed.heard()
    followed.close()


# -- the journal, where /dev/kmsg is refused ---------------------------------------------------------------------------


def journalctl(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program of this name on the PATH. It is asked for one line first, and then followed with -f."""
    file = folder / "journalctl"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def heard_within_limit(followed: Followed, count: int) -> tuple[str, ...]:
    heard: tuple[str, ...] = ()
    deadline = time.monotonic() + LIMIT_S
    while len(heard) < count and not followed.ended:
        assert select.select([followed], [], [], deadline - time.monotonic())[0]
        heard += followed.heard()
    return heard


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_where_kmsg_is_refused_the_journal_is_followed_and_ended_with_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
case "$*" in
*" -n 1") echo "usb 1-1" ;;
*" -f -n 0")
    echo $$ > {tmp_path}/pid
    printf '{{"MESSAGE": "NVRM: Xid 1, '
    sleep 0.1
    printf '%s\\n' 'it goes on"}}' '{{"MESSAGE": "usb"}}' 'no JSON' '["NVRM: 2"]' '{{"MESSAGE": [78, 86, 82, 77]}}' '{{}}'
    printf '%s\\n' '{{"MESSAGE": "overlayfs: \\nNVRM: Xid 3"}}' '{{"MESSAGE": "{PCIE}"}}'
    exec sleep 3600 ;;
esac"""
    journalctl(tmp_path, script, monkeypatch)
    followed = follow(time.monotonic, tells, tmp_path / "none")
    assert heard_within_limit(followed, 3) == ("NVRM: Xid 1, it goes on", "overlayfs:  NVRM: Xid 3", PCIE)
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    followed.close()
    assert not alive(pid)


def test_a_journal_that_ends_is_told_and_what_it_said_before_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journalctl(tmp_path, f"""echo '{{"MESSAGE": "{XID}"}}'""", monkeypatch)
    followed = follow(time.monotonic, tells, tmp_path / "none")
    heard = heard_within_limit(followed, 2)
    followed.close()
    assert heard == (XID,)
    assert followed.ended == "what tells the kernel's messages has ended"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("true", "journalctl shows no line of the kernel to this user"),
        ("echo No journal files were opened due to insufficient permissions. >&2; exit 1",
         "journalctl ended with 1: No journal files were opened due to insufficient permissions."),
    ],
)  # fmt: skip
def test_where_the_journal_is_refused_too_both_reasons_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    journalctl(tmp_path, script, monkeypatch)
    with pytest.raises(Unanswered) as silence:
        follow(time.monotonic, tells, tmp_path / "none")
    assert str(silence.value) == f"cannot open {tmp_path / 'none'}: no such file or directory; {why}"


def test_a_journalctl_that_is_gone_when_it_shall_be_followed_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journalctl(tmp_path, 'echo x; rm "$0"', monkeypatch)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(kernel_follower, "JOURNALCTL", (str(tmp_path / "journalctl"),))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(Unanswered, match="cannot run journalctl: no such file or directory"):
        follow(time.monotonic, tells, tmp_path / "none")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
