"""Lock files of killed compiles: removed where nobody can hold them, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine import jit_locks
from mgpu_llm.adapters.engine.jit_locks import caches, remove_stale

#: As torch's FileBaton takes it: made with O_EXCL, kept open, and left behind by a kill.
BATON = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def compiling(lock: Path) -> Iterator[subprocess.Popen[str]]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", BATON, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_stays_while_its_maker_lives_and_goes_with_a_word_once_that_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cu129" / "my_kernels" / "lock"
    with compiling(lock):
        assert remove_stale((tmp_path,)) == ()
        assert lock.exists()
    assert lock.exists()
    said = f"removed '{lock}': a compile that was killed left it, and every later one would wait for it"
    assert remove_stale((tmp_path,)) == (said,)
    assert not lock.exists()
    assert remove_stale((tmp_path, tmp_path / "missing")) == ()


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "py311_cu129" / "my_kernels"
    deep = tmp_path.joinpath(*"abcdefgh")
    for path in (folder, deep):
        path.mkdir(parents=True)
    (folder / "build.ninja.lock").touch()
    (folder / "lock.py").touch()
    (tmp_path / "py311_cu129" / "lock").mkdir()
    full, link = tmp_path / "full", tmp_path / "link"
    for path in (full, link):
        path.mkdir()
    (full / "lock").write_text("somebody's words")
    (tmp_path / "outside").touch()
    (link / "lock").symlink_to(tmp_path / "outside")
    (deep / "lock").touch()
    before = sorted(tmp_path.rglob("*"))
    assert remove_stale((tmp_path,)) == ()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a file of another user")
def test_a_lock_of_another_user_is_left(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    os.chown(tmp_path / "lock", 65534, 65534)
    assert remove_stale((tmp_path,)) == ()
    assert (tmp_path / "lock").exists()


def test_where_somebody_unseen_may_hold_it_it_stays_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jit_locks, "LOCAL", frozenset({"nfs"}))
        (told,) = remove_stale((tmp_path,))
        assert told.startswith(f"left '{lock}', for which the engine may wait for ever: it is on a file system (")
        assert told.endswith(") that other hosts may use; remove it if nothing compiles")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("mgpu_llm.adapters.engine.leftovers.FIRST_PID_NAMESPACE", "pid:[1]")
        (told,) = remove_stale((tmp_path,))
        assert "processes of other containers, which may use it, cannot be seen here" in told
    assert lock.exists()
    assert len(remove_stale((tmp_path,))) == 1


def test_a_cache_with_more_than_anybody_wants_to_read_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit_locks, "MOST_ENTRIES", 10)
    for number in range(20):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "lock").touch()
    assert remove_stale((tmp_path,)) == ()


def test_the_caches_are_those_of_the_engine_s_environment() -> None:
    assert caches({"HOME": "/h"}) == (Path("/h/.cache/torch_extensions"), Path("/h/.cache/flashinfer"))
    unit = {"HOME": "/h", "XDG_CACHE_HOME": "/c", "FLASHINFER_WORKSPACE_BASE": "/f"}
    assert caches(unit) == (Path("/c/torch_extensions"), Path("/f/.cache/flashinfer"))
    assert caches({**unit, "TORCH_EXTENSIONS_DIR": "/t"})[0] == Path("/t")
    assert caches({"HOME": "/h", "TORCH_EXTENSIONS_DIR": "relative"}) == (Path("/h/.cache/flashinfer"),)
