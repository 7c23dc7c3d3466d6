"""mgpud --check as an operator runs it: what it says where, and nothing of ours when nobody reads it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.daemon.lives import LIMIT_S
from tests.support.daemons import MGPUD
from tests.support.fake_setup import FakeSetup


def check(setup: FakeSetup, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> tuple[int, str, str]:
    """Exit status and what was said on stdout and stderr, "" where that is not ours to read."""
    done = subprocess.run(
        [MGPUD, "--config", setup.write(), "--check"], stdout=stdout, stderr=stderr, text=True, timeout=LIMIT_S
    )
    return done.returncode, done.stdout or "", done.stderr or ""


def unread() -> int:
    """A pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_a_folder_that_will_be_made_is_a_remark_and_the_check_makes_nothing(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path)
    code, out, err = check(setup)
    assert code == 0
    assert "no problems" in out
    assert err == f"remark: '{setup.state_dir}' is not there yet: it will be made\n"
    assert not setup.state_dir.exists()
    assert not setup.runtime_dir.exists()
    setup.state_dir.mkdir()
    assert check(setup) == (0, out, "")


def test_a_folder_that_cannot_be_made_is_a_remark_and_no_problem(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path)
    setup.state_dir.touch()
    code, out, err = check(setup)
    assert code == 0
    assert "no problems" in out
    assert err.startswith(
        f"remark: cannot use '{setup.state_dir}': it is not a folder; set daemon.state_dir, else loads are"
    )
    assert err.count("\n") == 1


def test_a_driver_that_cannot_be_asked_is_told_beside_the_problems_of_the_config(tmp_path: Path) -> None:
    settings = {"gpus.use": [0, 1], "model.path": "/no/such/model", "gpus.tensor_parallel": None}
    code, _, err = check(FakeSetup(folder=tmp_path, settings=settings))
    first, last = err.strip().splitlines()
    assert (code, "model.path" in first) == (78, True)
    assert last.startswith("cannot list the GPUs: ")


def test_a_reader_who_has_left_changes_neither_the_answer_nor_what_else_is_said(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path)
    setup.state_dir.mkdir()
    nobody = unread()
    assert check(setup, stdout=nobody) == (0, "", "")
    assert check(setup, stdout=nobody, stderr=nobody) == (0, "", "")
    wrong = FakeSetup(folder=tmp_path, settings={"engine.port": 0})
    assert check(wrong, stdout=nobody, stderr=nobody) == (78, "", "")
    os.close(nobody)


def test_a_result_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path)
    with Path("/dev/full").open("wb") as full:
        code, _, err = check(setup, stdout=full.fileno())
        assert (code, err) == (75, "cannot write the result: no space left on device\n")
        assert check(setup, stdout=full.fileno(), stderr=full.fileno()) == (75, "", "")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_nobody_reads_ends_without_a_word(option: str) -> None:
    nobody = unread()
    done = subprocess.run([MGPUD, option], stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
    os.close(nobody)
    assert done.stderr == ""
