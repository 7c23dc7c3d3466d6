"""What is written down of the engine's shared memory, for the case that engine and daemon die at once."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import ledger as ledgers
from mgpu_llm.adapters.engine.ledger import LOOKS, NAME, Ledger
from mgpu_llm.adapters.engine.leftovers import SHM

MARK = f"mgpu_ledger_{os.getpid()}"
HOLDER = """
import mmap, os, sys, time
held = []
for name in sys.argv[1:]:
    fd = os.open("/dev/shm/" + name, os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(fd, 4096)
    held.append(mmap.mmap(fd, 4096))
    os.close(fd)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def clean_shared_memory() -> Iterator[None]:
    yield
    for file in SHM.glob(f"*{MARK}*"):
        file.unlink()


@contextmanager
def holding(*names: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-S", "-c", HOLDER, *names], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.kill()


def look(ledger: Ledger, *pids: int) -> None:
    ledger.look(ledger.new(), pids)


def names() -> set[str]:
    return {file.name for file in SHM.glob(f"*{MARK}*")}


def killed_with_files(tmp_path: Path) -> None:
    """A life in which an engine held two files and another process a third, all of which were killed."""
    (SHM / f"psm_{MARK}_before").touch()
    ledger = Ledger(tmp_path)
    ledger.begin()
    with holding(f"psm_{MARK}", f"odd-{MARK}") as engine, holding(f"psm_{MARK}_other"):
        look(ledger, engine)


def test_the_next_life_removes_what_the_engine_was_seen_to_hold_and_nothing_else(tmp_path: Path) -> None:
    killed_with_files(tmp_path)
    told = Ledger(tmp_path).remove_left()
    assert names() == {f"psm_{MARK}_before", f"psm_{MARK}_other"}
    assert told == tuple(
        f"removed '/dev/shm/{name}', which an engine of an earlier run left" for name in (f"odd-{MARK}", f"psm_{MARK}")
    )
    assert not (tmp_path / NAME).exists()
    assert Ledger(tmp_path).remove_left() == ()


def test_a_file_that_was_made_anew_under_its_name_or_that_somebody_uses_stays(tmp_path: Path) -> None:
    killed_with_files(tmp_path)
    (SHM / f"psm_{MARK}").unlink()
    (SHM / f"psm_{MARK}").touch()
    with (SHM / f"odd-{MARK}").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert Ledger(tmp_path).remove_left() == ()
    assert {f"psm_{MARK}", f"odd-{MARK}"} <= names()


def test_what_was_written_before_the_host_was_booted_means_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_with_files(tmp_path)
    boot = tmp_path / "boot"
    boot.write_text("another\n")
    monkeypatch.setattr(ledgers, "BOOT_ID", boot)
    assert Ledger(tmp_path).remove_left() == ()
    assert f"psm_{MARK}" in names()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"boot": 1, "files": 2}', "[" * 100_000, "\x00"])
def test_a_ledger_that_is_garbage_removes_nothing(tmp_path: Path, text: str) -> None:
    killed_with_files(tmp_path)
    boot = json.loads((tmp_path / NAME).read_text())["boot"]
    for garbage in (text, json.dumps({"boot": boot, "files": [{"name": f"psm_{MARK}"}]})):
        (tmp_path / NAME).write_text(garbage)
        assert Ledger(tmp_path).remove_left() == ()
    assert f"psm_{MARK}" in names()


def test_a_clean_end_leaves_no_ledger_and_one_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin()
    with holding(f"psm_{MARK}") as engine:
        look(ledger, engine)
        assert (tmp_path / NAME).exists()
        ledger.clear()
        assert list(tmp_path.iterdir()) == []
        nowhere = Ledger(tmp_path / "missing")
        nowhere.begin()
        look(nowhere, engine)
        nowhere.clear()


def test_a_file_of_somebody_else_is_looked_for_a_few_times_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin()
    (SHM / f"psm_{MARK}").touch()
    for _ in range(LOOKS):
        assert [file.name for file in ledger.new()] == [f"psm_{MARK}"]
        look(ledger)
    assert ledger.new() == frozenset()
    assert not (tmp_path / NAME).exists()
