"""How what the kernel says becomes an event, by a real observer of a real engine, with a pipe that stands in for /dev/kmsg."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.host import kernel_follower
from mgpu_llm.adapters.host.kernel_follower import Followed
from mgpu_llm.adapters.host.program import Unanswered
from mgpu_llm.core import kernel
from mgpu_llm.core.events import EngineExited, Event, KernelSaid
from mgpu_llm.observer import Observer
from tests.support.engine_run import until
from tests.support.fake_nvml import FakeGpu, FakeNvml

XID = "NVRM: Xid (PCI:0000:{bus}:00): 79, pid=1234, name=python3, GPU has fallen off the bus."


@dataclass
class Kernel:
    """A pipe of packets: as of /dev/kmsg, a read gives one record."""

    read_fd: int
    write_fd: int

    def follow(self) -> Followed:
        return kernel_follower.follow(time.monotonic, kernel.tells, Path(f"/proc/self/fd/{self.read_fd}"))

    def say(self, text: str) -> None:
        os.write(self.write_fd, f"4,1,1000,-;{text}\n".encode())


@contextmanager
def a_kernel() -> Iterator[Kernel]:
    read_fd, write_fd = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    try:
        yield Kernel(read_fd, write_fd)
    finally:
        os.close(read_fd)
        os.close(write_fd)


@dataclass
class Heard:
    observer: Observer
    told: list[Event] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [event.text for event in self.told if isinstance(event, KernelSaid)]


@asynccontextmanager
async def heard(follow: Callable[[], Followed], attempt: int = 1) -> AsyncIterator[Heard]:
    """An engine without processes or GPUs is watched."""
    told = list[Event]()
    found = Heard(Observer(Gpus(), {}, time.monotonic, told.append, follow), told)
    watching = asyncio.create_task(found.observer.watch(attempt, (), lambda: (), lambda: True))
    try:
        yield found
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        assert watching.cancelled()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_line_of_the_kernel_is_told_with_the_attempt_it_came_in_and_as_soon_as_it_comes() -> None:
    async def story() -> list[Event]:
        with a_kernel() as said:
            async with heard(said.follow, attempt=7) as found:
                said.say(f"overlayfs: failed to resolve '{XID.format(bus='17')}': -2")
                said.say(XID.format(bus="17"))
                said.say("usb 1-1: new device")
                await until("it is heard", lambda: bool(found.lines))
                return found.told

    (event,) = (event for event in asyncio.run(story()) if isinstance(event, KernelSaid))
    assert (event.attempt, event.text, event.elsewhere) == (7, XID.format(bus="17"), False)
    assert 0 <= time.monotonic() - event.at < 30


def test_who_is_no_longer_watched_is_no_longer_heard_and_nothing_is_left_open() -> None:
    async def story() -> None:
        with a_kernel() as said:
            before = open_files()
            async with heard(said.follow) as found:
                said.say("NVRM: first")
                await until("it is heard", lambda: found.lines == ["NVRM: first"])
                during = open_files()
            assert during > before
            assert open_files() == before
            said.say("NVRM: second")
            found.observer.tell(EngineExited(at=1.0, attempt=1, status=0))
            await asyncio.sleep(0.1)
            assert found.lines == ["NVRM: first"]

    asyncio.run(story())


def test_of_an_engines_end_is_told_only_after_what_the_kernel_has_said_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel lists every process of the host before it says whom it kills: more than one reading takes."""
    monkeypatch.setattr(kernel_follower, "RECORDS_AT_ONCE", 10)
    kill = "oom-kill:constraint=CONSTRAINT_NONE,task=VLLM::Worker_TP,pid=71,uid=0"

    async def story() -> list[Event]:
        with a_kernel() as said:
            async with heard(said.follow) as found:
                said.say("NVRM: first")
                await until("the kernel is listened to", lambda: bool(found.lines))
                for pid in range(95):
                    said.say(
                        f"[ {pid}]     0  {pid}    20596    19742    18048     1694         0   208896        0     0 x"
                    )
                said.say(kill)
                found.observer.tell(EngineExited(at=1.0, attempt=1, status=-9))  # the loop had no turn
                return found.told[-2:]

    last, end = asyncio.run(story())
    assert isinstance(last, KernelSaid)
    assert last.text == kill
    assert isinstance(end, EngineExited)


def refused() -> Followed:
    raise Unanswered("cannot open /dev/kmsg: operation not permitted")


def test_where_the_kernel_cannot_be_heard_that_is_told_once_in_a_life_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def story() -> None:
        async with heard(refused) as found:
            await until("the processes are seen", lambda: len(found.told) >= 2)
            again = asyncio.create_task(found.observer.watch(2, (), lambda: (), lambda: True))
            await until("those of the next too", lambda: any(event.attempt == 2 for event in found.told))  # type: ignore[union-attr]
            again.cancel()

    asyncio.run(story())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "kernel.unobserved" in line)
    assert "cannot open /dev/kmsg: operation not permitted" in line
    assert "info" in line


def test_a_source_that_ends_is_told_and_what_it_said_last_is_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "kmsg")

    async def story() -> None:
        writer = os.open(tmp_path / "kmsg", os.O_RDWR)
        follow = lambda: kernel_follower.follow(time.monotonic, kernel.tells, tmp_path / "kmsg")  # noqa: E731
        async with heard(follow) as found:
            os.write(writer, b"4,1,1000,-;NVRM: first\n")
            await until("it is heard", lambda: bool(found.lines))
            os.write(writer, b"4,2,2000,-;NVRM: last\n")
            os.close(writer)
            await until("its end is told", lambda: "kernel.unobserved" in capsys.readouterr().out)
            assert found.lines == ["NVRM: first", "NVRM: last"]
            found.observer.tell(EngineExited(at=1.0, attempt=1, status=0))

    asyncio.run(story())


def test_one_that_opens_after_nobody_waits_any_more_is_closed() -> None:
    asked, opened, released = threading.Event(), threading.Event(), threading.Event()

    async def story() -> None:
        with a_kernel() as said:

            def late() -> Followed:
                asked.set()
                released.wait(30)
                followed = said.follow()
                opened.set()
                return followed

            before = open_files()
            async with heard(late):
                await until("it is asked", asked.is_set)
            released.set()
            await until("it is open", opened.is_set)
            await until("it is closed", lambda: open_files() == before)

    asyncio.run(story())


HEAR = """
import asyncio, json, sys, time
from pathlib import Path
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.host import kernel_follower
from mgpu_llm.core import kernel
from mgpu_llm.observer import Observer
from tests.support.fake_nvml.asked import uuid
async def story():
    told = asyncio.Queue()
    follow = lambda: kernel_follower.follow(time.monotonic, kernel.tells, Path(sys.argv[1]))
    observer = Observer(Gpus(), {"1": uuid(1)}, time.monotonic, told.put_nowait, follow)
    watching = asyncio.create_task(observer.watch(1, ("1",), lambda: (), lambda: True))
    while not getattr(await told.get(), "elsewhere", False): pass
    print("the address is known", flush=True)
    heard = []
    while len(heard) < 2:
        event = await told.get()
        if ":17:" not in getattr(event, "text", ":17:"): heard.append((event.text, event.elsewhere))
    watching.cancel()
    return heard
print(json.dumps(asyncio.run(story())))
"""


def test_what_is_about_a_gpu_that_is_not_in_the_launch_is_marked_so(tmp_path: Path, library: Path) -> None:
    nvml = FakeNvml(tmp_path, library)
    nvml.set([FakeGpu(), FakeGpu()])  # at 00000000:10:00.0 and 00000000:11:00.0
    os.mkfifo(tmp_path / "kmsg")
    writer = os.open(tmp_path / "kmsg", os.O_RDWR)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **nvml.environment()}
    with subprocess.Popen(
        [sys.executable, "-c", HEAR, str(tmp_path / "kmsg")], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        deadline = time.monotonic() + 30
        while not select.select([process.stdout], [], [], 0.5)[0]:
            assert time.monotonic() < deadline
            os.write(writer, f"4,1,1000,-;{XID.format(bus='17')}\n".encode())
        assert process.stdout.readline() == "the address is known\n"
        for bus in ("10", "11"):
            os.write(writer, f"4,1,1000,-;{XID.format(bus=bus)}\n".encode())
        assert json.loads(process.stdout.read()) == [[XID.format(bus="10"), True], [XID.format(bus="11"), False]]
    os.close(writer)
