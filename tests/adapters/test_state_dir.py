"""What a check says of the folder of what the daemon remembers, and that it is what the daemon then finds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mgpu_llm.adapters import state_dir
from mgpu_llm.core import instances, sandbox
from tests.support.read_only import inside, needs_mounts

NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere; who is not root stays who he is."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def can_be_used(folder: Path) -> bool:
    with state_dir.held(folder) as found:
        return found is not None


def why(folder: Path) -> str:
    """What is foreseen of a folder that cannot be used."""
    said = state_dir.foreseen(folder)
    consequence = "; set daemon.state_dir, else loads are not recorded"
    assert said.startswith(f"cannot use '{folder}': ")
    assert consequence in said
    assert "\n" not in said
    return said.removeprefix(f"cannot use '{folder}': ").partition(consequence)[0]


def test_nothing_is_said_of_a_folder_that_is_there_and_can_be_used(tmp_path: Path) -> None:
    assert state_dir.foreseen(tmp_path) == ""
    assert can_be_used(tmp_path)


def test_nothing_is_said_while_the_daemon_has_it(tmp_path: Path) -> None:
    with state_dir.held(tmp_path / "state") as found:
        assert found is not None
        assert state_dir.foreseen(found) == ""


def test_a_folder_that_is_not_there_will_be_made_but_not_by_the_question(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "lib" / "state"
    assert state_dir.foreseen(folder) == f"'{folder}' is not there yet: it will be made"
    assert list(tmp_path.iterdir()) == []
    assert can_be_used(folder)


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    assert why(file) == why(dangling) == "it is not a folder"
    assert why(file / "state") == f"'{file}' is not a folder"
    assert not any(map(can_be_used, (file, dangling, file / "state")))


def test_a_folder_that_this_user_may_not_write_in_is_told_with_the_user(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with as_nobody():
        user = f"this user (uid {os.geteuid()})"
        assert why(open_folder) == f"{user} may not write in it"
        assert not can_be_used(open_folder)


def test_a_folder_that_this_user_may_not_make_is_told_with_where_it_would_be(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with as_nobody():
        user = f"this user (uid {os.geteuid()})"
        assert why(open_folder / "a" / "b") == f"{user} may not make it in '{open_folder}'"
        assert not can_be_used(open_folder / "a" / "b")


def test_a_folder_that_this_user_may_not_look_for_is_one_that_he_may_not_make(open_folder: Path) -> None:
    (open_folder / "hidden" / "state").mkdir(parents=True)
    (open_folder / "hidden").chmod(0)
    (open_folder / "link").symlink_to(open_folder / "hidden" / "state")
    with as_nobody():
        user = f"this user (uid {os.geteuid()})"
        assert why(open_folder / "link")
        assert why(open_folder / "hidden" / "state") == f"{user} may not make it in '{open_folder / 'hidden'}'"
        assert not can_be_used(open_folder / "hidden" / "state")
    (open_folder / "hidden").chmod(0o755)


@needs_mounts
def test_a_unit_that_makes_it_read_only_is_told_with_what_opens_it_but_not_to_a_shell(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from mgpu_llm.adapters import state_dir\n"
        "with state_dir.held(pathlib.Path(sys.argv[1])) as found: assert found is None\n"
    )
    command = inside(tmp_path, sys.executable, "-c", script, str(tmp_path / "state"))
    shell = {name: value for name, value in os.environ.items() if name != "INVOCATION_ID"}
    said = [
        subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60).stdout
        for environ in (shell, {**shell, "INVOCATION_ID": "8b5f"})
    ]
    assert all(f"cannot use '{tmp_path}/state': read-only file system; set daemon.state_dir" in line for line in said)
    unit = sandbox.unit_of(Path("/proc/self/cgroup").read_text()) or instances.unit("")
    cure = f"sudo systemctl edit {unit}: ReadWritePaths={tmp_path}/state under [Service]"
    assert [cure in line for line in said] == [False, True]


def test_another_fault_of_the_folder_is_not_laid_to_the_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INVOCATION_ID", "8b5f")
    assert state_dir.sandboxed(PermissionError(13, "Permission denied"), tmp_path) == ""
