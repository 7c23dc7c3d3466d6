"""The history file with real files, folders and disks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters import state_dir
from mgpu_llm.adapters.memory.file import MOST_BYTES
from mgpu_llm.adapters.memory.history import History
from mgpu_llm.core.history import from_json, to_json
from tests.config.loading import unprivileged
from tests.core.test_history import start
from tests.support.small_disk import small_disk


def test_a_start_is_remembered_at_once_and_by_the_next_daemon(tmp_path: Path, logged: list[EventDict]) -> None:
    history = History(tmp_path)
    assert not history.starts
    history.remember(start("a"))
    history.remember(start("b"))
    assert history.starts == (start("a"), start("b"))
    history.close()
    assert History(tmp_path).starts == (start("a"), start("b"))
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]
    assert stat.S_IMODE((tmp_path / "history.json").stat().st_mode) == 0o640
    assert logged == []


def test_without_a_folder_starts_are_remembered_until_the_daemon_ends(logged: list[EventDict]) -> None:
    history = History(None)
    history.remember(start())
    history.close()
    assert history.starts == (start(),)
    assert logged == []


def _text(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_text("{"), "it is not JSON: "),
        (_text('{"format": 2, "starts": []}'), "it has format '2', and this version knows 1"),
        (_text(to_json([start()]).replace("112.5", "1" + "0" * 400)), 'start 0 has no seconds "duration_s"'),
        (_text("[" * 100_000), "it is nested too deeply"),
        (_text(" " * (MOST_BYTES + 1)), "it is larger than 1024 KiB"),
        (lambda file: file.write_bytes(b"\xff"), "'utf-8' codec can't decode"),
        (lambda file: file.mkdir(), "it is no plain file"),
        (os.mkfifo, "it is no plain file"),
        (lambda file: file.symlink_to("/etc/passwd"), "too many levels of symbolic links"),
    ],
    ids=["broken", "of-the-future", "endless", "deep", "huge", "binary", "a-folder", "a-fifo", "a-link"],
)
def test_a_file_that_is_none_of_ours_is_moved_aside_with_one_warning_and_a_new_one_begun(
    tmp_path: Path, logged: list[EventDict], spoil: Callable[[Path], object], why: str
) -> None:
    spoil(tmp_path / "history.json")
    history = History(tmp_path)
    assert history.starts == ()
    history.remember(start())
    history.close()
    assert from_json((tmp_path / "history.json").read_text()) == (start(),)
    (warning,) = logged
    assert (warning["event"], warning["log_level"]) == ("state.broken", "warning")
    assert warning["reason"].startswith(f"cannot use '{tmp_path}/history.json': {why}")
    assert warning["moved_to"] == f"{tmp_path}/history.json.broken"
    assert os.path.lexists(tmp_path / "history.json.broken")


def test_a_history_that_can_neither_be_read_nor_moved_is_left_with_one_warning(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    (tmp_path / "history.json").write_text(to_json([start()]))
    (tmp_path / "history.json").chmod(0)
    tmp_path.chmod(0o555)
    with unprivileged():
        assert History(tmp_path).starts == ()
    (warning,) = logged
    assert warning["reason"].endswith("permission denied; cannot move it aside: permission denied")


def test_a_folder_that_cannot_be_written_is_told_once_and_the_starts_are_remembered(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with small_disk(tmp_path) as disk:
        disk.read_only()
        history = History(disk.folder)
        for launch in "abc":
            history.remember(start(launch))
            history.close()
        assert [each.launch for each in history.starts] == ["a", "b", "c"]
        (warning,) = logged
        assert warning["reason"] == f"cannot write '{disk.folder}/history.json': read-only file system"


def test_on_a_full_disk_the_old_history_stays_whole_and_a_later_start_is_written_again(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with small_disk(tmp_path) as disk:
        history = History(disk.folder)
        history.remember(start("a"))
        history.close()
        disk.fill()
        for launch in "bc":
            history.remember(start(launch))
            history.close()
        assert [each.launch for each in History(disk.folder).starts] == ["a"]
        assert [(line["event"], line["reason"]) for line in logged] == [
            ("state.failed", f"cannot write '{disk.folder}/history.json': no space left on device")
        ]
        disk.free()
        history.remember(start("d"))
        history.close()
        assert [each.launch for each in History(disk.folder).starts] == ["a", "b", "c", "d"]


def test_a_link_in_the_place_of_what_is_being_written_is_replaced_and_not_followed(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "state"
    precious.write_text("mine")
    precious.chmod(0o604)
    folder.mkdir()
    (folder / "history.json.new").symlink_to(precious)
    history = History(folder)
    history.remember(start())
    history.close()
    assert (precious.read_text(), stat.S_IMODE(precious.stat().st_mode)) == ("mine", 0o604)
    assert [path.name for path in folder.iterdir()] == ["history.json"]
    assert History(folder).starts == (start(),)
    assert logged == []


def test_a_daemon_that_is_killed_while_it_writes_again_and_again_leaves_a_whole_history(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mgpu_llm.adapters.memory.history import History;"
        "from tests.core.test_history import start\n"
        "history = History(Path(sys.argv[1])); print('writing', flush=True)\n"
        "while True: history.remember(start()); history.close()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, env=env) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            while not (tmp_path / "history.json").exists():
                pass
            writer.kill()
        assert from_json((tmp_path / "history.json").read_text())


def test_a_state_folder_is_made_and_can_be_used_again_once_its_holder_has_let_go(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    for _ in range(2):
        with state_dir.held(tmp_path / "new" / "state") as folder:
            assert folder == tmp_path / "new" / "state"
            assert stat.S_IMODE(folder.stat().st_mode) & 0o027 == 0
            assert list(folder.iterdir()) == []
    assert logged == []


def test_a_state_folder_that_another_daemon_uses_is_done_without(tmp_path: Path, logged: list[EventDict]) -> None:
    with state_dir.held(tmp_path) as first, state_dir.held(tmp_path) as second:
        assert (first, second) == (tmp_path, None)
    (warning,) = logged
    assert (warning["event"], warning["log_level"]) == ("state.unusable", "warning")
    assert warning["reason"] == f"cannot use '{tmp_path}': another mgpud uses it; set daemon.state_dir"


def test_a_state_folder_that_cannot_be_made_or_written_is_done_without(tmp_path: Path, logged: list[EventDict]) -> None:
    (tmp_path / "file").touch()
    with state_dir.held(tmp_path / "file" / "state") as folder:
        assert folder is None
    (tmp_path / "closed").mkdir(mode=0o555)
    with unprivileged(), state_dir.held(tmp_path / "closed") as folder:
        assert folder is None
    reasons = [line["reason"].partition(": ")[2] for line in logged]
    assert reasons == ["not a directory; set daemon.state_dir", "permission denied; set daemon.state_dir"]


def test_a_state_folder_on_a_full_disk_is_done_without(tmp_path: Path, logged: list[EventDict]) -> None:
    with small_disk(tmp_path) as disk:
        disk.fill()
        with state_dir.held(disk.folder) as folder:
            assert folder is None
    assert "no space left on device" in logged[0]["reason"]
