from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine.leftovers import SHM, SOCKET_DIR_BYTES, make_socket_folder, remove_folder
from mgpu_llm.core.events import EngineGone
from tests.support.engine_run import running

MARK = f"mgpu_test_{os.getpid()}"


@pytest.fixture(autouse=True)
def clean_shared_memory() -> Iterator[None]:
    yield
    for file in SHM.glob(f"*{MARK}*"):
        file.unlink()


def leave(*names: str, hold: bool = False) -> str:
    """Python that makes these files in /dev/shm, and holds them mapped or lets go of them."""
    return f"""
import mmap, os, time
held = []
for name in {names!r}:
    fd = os.open("/dev/shm/" + name, os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(fd, 4096)
    if {hold}: held.append(mmap.mmap(fd, 4096))
    os.close(fd)
print("left", flush=True)
time.sleep(600)
"""


def kept_after(tmp_path: Path, code: str) -> set[str]:
    """What is left in /dev/shm of an engine that ran `code` and was killed."""

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code)
            await run.line("left")
            await run.engine.kill(20)
            assert run.all(EngineGone)[0].remarks == ()

    asyncio.run(story())
    return {file.name for file in SHM.glob(f"*{MARK}*")}


def test_shared_memory_with_the_names_of_vllm_and_nccl_is_removed_after_a_kill(tmp_path: Path) -> None:
    assert kept_after(tmp_path, leave(f"psm_{MARK}", f"nccl-{MARK}", f"sem.mp-{MARK}")) == set()


def test_a_file_of_any_name_that_the_engine_held_is_removed(tmp_path: Path) -> None:
    assert kept_after(tmp_path, leave(f"oddly-named-{MARK}", hold=True)) == set()


def test_a_new_file_of_an_unknown_name_that_nobody_saw_the_engine_hold_stays(tmp_path: Path) -> None:
    assert kept_after(tmp_path, leave(f"oddly-named-{MARK}")) == {f"oddly-named-{MARK}"}


def test_a_file_that_was_there_before_stays_even_if_the_engine_used_it(tmp_path: Path) -> None:
    (SHM / f"psm_{MARK}").write_bytes(b"before")
    assert kept_after(tmp_path, leave(f"psm_{MARK}", hold=True)) == {f"psm_{MARK}"}


def test_a_new_file_that_another_process_holds_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path / "engine") as run, running(tmp_path / "other") as other:
            await run.python("import time; print('up', flush=True); time.sleep(600)")
            await run.line("up")
            await other.python(leave(f"psm_{MARK}", hold=True))
            await other.line("left")
            await run.engine.kill(20)
            assert run.all(EngineGone)
            assert (SHM / f"psm_{MARK}").exists()
            assert len(other.engine.pids()) == 1

    (tmp_path / "engine").mkdir()
    (tmp_path / "other").mkdir()
    asyncio.run(story())
    assert not (SHM / f"psm_{MARK}").exists()


def test_the_rendezvous_file_that_the_engine_named_in_its_log_is_removed(tmp_path: Path) -> None:
    named = tmp_path / f"vllm_dist_{'0a' * 16}"
    other = tmp_path / f"vllm_dist_{'0b' * 16}"
    other.touch()
    code = f"open({str(named)!r}, 'w').close(); print('distributed_init_method=file://{named} backend=gloo')\n"
    kept_after(tmp_path, code + leave())
    assert not named.exists()
    assert other.exists()


def test_sockets_go_where_their_path_still_fits(tmp_path: Path) -> None:
    short = Path("/tmp") / f"m{os.getpid()}"
    short.mkdir()
    long = tmp_path / ("x" * SOCKET_DIR_BYTES)
    long.mkdir()
    for preferred, expected in ((short, short), (long, Path("/tmp")), (tmp_path / "missing", Path("/tmp"))):
        folder = make_socket_folder(preferred)
        assert folder.parent == expected
        assert len(bytes(folder)) <= SOCKET_DIR_BYTES
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "socket").touch()
        assert remove_folder(folder) == ()
        assert not folder.exists()
    short.rmdir()
