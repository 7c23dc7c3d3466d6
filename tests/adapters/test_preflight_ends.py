"""However a preflight ends, nothing of it is left: neither processes, nor files, nor descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from mgpu_llm.adapters.preflight import program
from tests.adapters.test_preflight import FAKE_TORCH, HANGS, QUICK, TRANSPORTS, Fault, environment, gpus, preflight

ROOT: Final = Path(__file__).resolve().parents[2]
#: Nothing here takes so long, except on a machine that stands still.
LIMIT_S: Final = 30.0
IMPORT: Final[Fault] = {"at": "import", "do": "hang"}
CONTEXT: Final[Fault] = {"at": "context", "do": "hang"}


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """In the environment of every process of a check, and by which they are found."""
    mark = f"preflight-of-{os.getpid()}-{tmp_path.name}"
    yield mark
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Processes whose environment has the mark; a zombie has none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def until_there_are(count: int, mark: str) -> None:
    """Wait for so many processes, the probe's own among them."""
    wait_for(lambda: len(marked(mark)) >= count)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a check makes its own folder."""
    made = tmp_path / "tmp"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    return made


def nothing_is_left_by(what: Callable[[], Coroutine[Any, Any, None]], folder: Path) -> None:
    descriptors = sorted(map(str, Path("/proc/self/fd").iterdir()))
    asyncio.run(what())
    assert sorted(map(str, Path("/proc/self/fd").iterdir())) == descriptors
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "processes"),
    [(IMPORT, 1), (CONTEXT, 3), ({**HANGS, "gpu": 1}, 1 + 2 + 2 + 2)],
    ids=["import", "contexts", "alternatives"],
)
def test_a_check_that_is_cancelled_leaves_nothing(fault: Fault, processes: int, mark: str, folder: Path) -> None:
    async def cancelled() -> None:
        checking = preflight(patience=QUICK if processes > 3 else None)
        task = asyncio.ensure_future(checking.check(gpus(2), environment(fault, MARK=mark), TRANSPORTS))
        await asyncio.to_thread(until_there_are, processes, mark)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # whoever is impatient gets no further
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked(mark) == []

    nothing_is_left_by(cancelled, folder)


def test_a_check_that_is_cancelled_at_once_leaves_nothing(mark: str, folder: Path) -> None:
    async def cancelled() -> None:
        task = asyncio.ensure_future(preflight().check(gpus(2), environment(IMPORT, MARK=mark), TRANSPORTS))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked(mark) == []

    nothing_is_left_by(cancelled, folder)


def test_a_cancellation_that_comes_together_with_news_is_not_lost() -> None:
    async def cancelled(passes: int) -> None:
        probe = await program.begin([sys.executable], environment(IMPORT))
        hearing = asyncio.ensure_future(probe.messages(LIMIT_S))
        try:
            await asyncio.sleep(0.05)
            probe._hear('{"is": "loaded"}')
            for _ in range(passes):  # so far the news has come by then
                await asyncio.sleep(0)
            if hearing.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await hearing
        finally:
            await probe.end()

    for passes in range(4):
        asyncio.run(cancelled(passes))


@pytest.mark.parametrize("fault", [None, HANGS], ids=["healthy", "hanging"])
def test_a_check_that_comes_to_its_end_leaves_nothing(fault: Fault | None, mark: str, folder: Path) -> None:
    async def ended() -> None:
        faults = [fault] if fault else []
        await preflight(patience=QUICK).check(gpus(2), environment(*faults, MARK=mark), TRANSPORTS)
        assert marked(mark) == []

    nothing_is_left_by(ended, folder)


def test_a_probe_that_does_not_get_through_its_import_is_killed(mark: str) -> None:
    began = time.monotonic()
    checked = asyncio.run(preflight(deadline_s=0.5).check(gpus(2), environment(IMPORT, MARK=mark), TRANSPORTS))
    assert checked.unobserved == "PyTorch was not loaded in time"
    assert checked.took_s >= 0.5
    assert time.monotonic() - began < LIMIT_S
    assert marked(mark) == []


def test_ranks_die_with_their_probe_and_that_is_no_verdict(mark: str) -> None:
    async def killed() -> str:
        task = asyncio.ensure_future(preflight().check(gpus(2), environment(CONTEXT, MARK=mark), TRANSPORTS))
        await asyncio.to_thread(until_there_are, 3, mark)
        os.kill(min(marked(mark)), signal.SIGKILL)
        checked = await task
        assert marked(mark) == []
        assert checked.transports == ()
        return checked.unobserved

    assert asyncio.run(killed()) == "the probe ended"


@pytest.mark.parametrize(("fault", "processes"), [("import", 1), ("context", 3)], ids=["import", "contexts"])
def test_a_probe_dies_with_its_daemon(fault: str, processes: int, mark: str, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from tests.adapters.test_preflight import *;"
        "asyncio.run(preflight().check(gpus(2), environment({'at': sys.argv[1], 'do': 'hang'}, MARK=sys.argv[2]), TRANSPORTS))"
    )
    places = os.pathsep.join(map(str, (ROOT, ROOT / "daemon")))
    daemon = subprocess.Popen(
        [sys.executable, "-c", program, fault, mark], env={**os.environ, "PYTHONPATH": places, "TMPDIR": str(tmp_path)}
    )
    try:
        until_there_are(processes, mark)
    finally:
        daemon.kill()
        daemon.wait()
    wait_for(lambda: not marked(mark))


def test_what_ranks_share_in_memory_is_removed_with_them(tmp_path: Path, mark: str) -> None:
    shared = Path(f"/dev/shm/nccl-{mark}")
    mapping = (
        "import mmap",
        f"with open({str(shared)!r}, 'w+b') as file:",
        "    file.truncate(1)",
        "    kept = mmap.mmap(file.fileno(), 1)",
    )
    (tmp_path / "sitecustomize.py").write_text("\n".join(mapping))
    places = os.pathsep.join(map(str, (tmp_path, FAKE_TORCH)))
    faults = environment(HANGS, MARK=mark, PYTHONPATH=places)
    try:
        asyncio.run(preflight(patience=QUICK).check(gpus(2), faults, TRANSPORTS))
        assert not shared.exists()
    finally:
        shared.unlink(missing_ok=True)
