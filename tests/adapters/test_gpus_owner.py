"""Whose process it is that uses a GPU."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu_llm.adapters.gpus import owner as owner_module
from mgpu_llm.adapters.gpus.owner import command_line, owner


def test_a_process_is_told_with_its_user_its_name_and_its_words() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            told = owner(child.pid)
            while command_line(child.pid)[:1] != ["sleep"]:  # between fork and exec it is still us
                told = owner(child.pid)
            assert told is not None
            assert told.user == pwd.getpwuid(os.getuid()).pw_name
            assert command_line(child.pid) == ["sleep", "60"]
            assert owner(child.pid) == owner_module.Owner(user=told.user, name="sleep")
        finally:
            child.kill()


def test_a_process_that_has_ended_is_nobodys() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    assert (owner(child.pid), command_line(child.pid)) == (None, [])


def test_one_that_is_dead_and_not_yet_buried_has_no_words_left() -> None:
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        told = owner(child.pid)
        assert (told and told.name, command_line(child.pid)) == ("true", [])


@pytest.mark.parametrize("status", ["", "Name:\tx\n", "Uid:\tnobody\n", "Uid:\t\n"])
def test_a_status_that_cannot_be_understood_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setattr(owner_module, "PROC", tmp_path)
    (tmp_path / "5").mkdir()
    (tmp_path / "5/status").write_text(status)
    assert owner(5) is None


def test_a_user_without_a_name_is_told_by_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "PROC", tmp_path)
    (tmp_path / "5").mkdir()
    (tmp_path / "5/status").write_text("Name:\tx\nUid:\t3999999999\t0\t0\t0\n")
    assert owner(5) == owner_module.Owner(user="uid 3999999999", name="x")
