"""What a remembered file does while its disk, or the host's number of threads, is no help."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters.memory.file import File
from tests.support.small_disk import small_disk


class DeadDisk:
    """Nothing that is written reaches it, until it is alive again."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.alive = threading.Event()
        self.writes = 0

    def fsync(self, _descriptor: int) -> None:
        self.writes += 1
        self.asked.release()
        self.alive.wait()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadDisk]:
    disk = DeadDisk()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        yield disk
        disk.alive.set()


def test_a_text_is_written_and_removed_in_order(tmp_path: Path, logged: list[EventDict]) -> None:
    path = tmp_path / "file"
    file = File(path)
    for wanted in ("a", None, "b", "c", None, None, "d"):
        file.keep(wanted)
    file.close()
    assert path.read_text() == "d"
    file.keep(None)
    file.close()
    file.keep(None)
    file.close()
    assert list(tmp_path.iterdir()) == []
    assert logged == []


def test_on_a_dead_disk_one_thread_waits_the_loop_and_the_end_do_not_and_the_last_text_wins(
    tmp_path: Path, dead: DeadDisk
) -> None:
    path = tmp_path / "file"
    file = File(path)
    began = time.monotonic()
    file.keep("a")
    assert dead.asked.acquire(timeout=10)
    for text in "bcdefg":
        file.keep(text)
    assert [thread.name for thread in threading.enumerate()].count("memory") == 1
    file.close(0.1)
    assert time.monotonic() - began < 5
    assert not path.exists()
    dead.alive.set()
    file.close()
    assert (path.read_text(), dead.writes) == ("g", 2)


def test_where_no_thread_can_be_started_it_is_told_once_and_written_when_one_can(
    tmp_path: Path, logged: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    path = tmp_path / "file"
    file = File(path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        file.keep("a")
        file.keep("b")
    file.close()
    assert not path.exists()
    (warning,) = logged
    assert warning["reason"] == f"cannot write '{path}': can't start new thread"
    file.keep("c")
    file.close()
    assert path.read_text() == "c"


def test_a_file_that_cannot_be_removed_is_told_once(tmp_path: Path, logged: list[EventDict]) -> None:
    with small_disk(tmp_path) as disk:
        path = disk.folder / "file"
        path.write_text("a")
        disk.read_only()
        file = File(path)
        for _ in range(3):
            file.keep(None)
            file.close()
        assert path.read_text() == "a"
    (warning,) = logged
    assert (warning["event"], warning["log_level"]) == ("state.failed", "warning")
    assert warning["reason"] == f"cannot write '{path}': read-only file system"
