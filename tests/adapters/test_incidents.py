"""Incidents on disk: whole or not there, bounded, and never more than what has their name."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
import threading
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters.incidents import MOST_BYTES, Incidents, NoIncidentError
from tests.support.small_disk import small_disk

FIRST, SECOND, THIRD = (f"20261124T21050{n}Z-a{n}-engine-exited" for n in (1, 2, 3))
FILES = {"incident.json": b'{"attempt": 1}', "engine.log": b"x" * 1000}


def incidents(folder: Path, keep: int = 20, max_bytes: int = 1 << 20) -> Incidents:
    return Incidents(folder, keep=keep, max_bytes=max_bytes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_is_kept_with_its_files_under_modes_for_owner_and_group(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "incidents"
    assert incidents(folder).keep(FIRST, FILES)
    assert {file.name: file.read_bytes() for file in (folder / FIRST).iterdir()} == FILES
    assert stat.S_IMODE((folder / FIRST).stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in (folder / FIRST).iterdir()} == {0o640}


def test_without_a_folder_or_with_none_to_keep_nothing_is_written_and_nothing_found(tmp_path: Path) -> None:
    for nothing in (Incidents(None, keep=20, max_bytes=1), incidents(tmp_path, keep=0)):
        nothing.adopt()
        assert nothing.folder is None
        assert not nothing.keep(FIRST, FILES)
        assert nothing.listed() == []
        with pytest.raises(NoIncidentError, match="none is kept"):
            nothing.find("last")
    assert names(tmp_path) == []


def test_the_oldest_go_when_there_are_too_many_or_too_much(tmp_path: Path) -> None:
    two = incidents(tmp_path, keep=2)
    for name in (FIRST, SECOND, THIRD):
        assert two.keep(name, FILES)
    assert names(tmp_path) == [SECOND, THIRD]
    assert incidents(tmp_path, max_bytes=2100).keep(FIRST.replace("-a1-", "-a9-"), FILES)
    assert names(tmp_path) == [FIRST.replace("-a1-", "-a9-"), THIRD]


def test_after_the_clock_was_set_back_the_newest_is_still_the_last_and_the_oldest_goes_first(tmp_path: Path) -> None:
    ahead, *behind = (f"20{year}1124T210500Z-a1-engine-exited" for year in (99, 26, 27, 25, 24))
    incidents(tmp_path).keep(ahead, FILES)
    next_century = 4_000_000_000
    os.utime(tmp_path / ahead / "incident.json", (next_century, next_century))
    for name in behind:
        # Each by another life of the daemon.
        assert incidents(tmp_path, keep=4).keep(name, FILES)
        assert incidents(tmp_path).find("last").name == name
    assert [told["id"] for told in incidents(tmp_path).listed()] == behind
    # A note that somebody puts into one does not make it the newest.
    (tmp_path / behind[0] / "notes.txt").touch()
    os.utime(tmp_path / behind[0], (next_century * 2, next_century * 2))
    assert incidents(tmp_path).find("last").name == behind[-1]


def test_one_without_its_document_counts_as_the_oldest(tmp_path: Path) -> None:
    kept = incidents(tmp_path, keep=2)
    for name in (FIRST, SECOND):
        kept.keep(name, FILES)
    (tmp_path / SECOND / "incident.json").unlink()
    assert kept.find("last").name == FIRST
    kept.keep(THIRD, FILES)
    assert names(tmp_path) == [FIRST, THIRD]


def test_what_a_killed_daemon_left_half_done_is_removed_at_the_start_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f".new-{FIRST}").mkdir()
    (tmp_path / f".new-{FIRST}" / "engine.log").touch()
    for strange in (".new-x", "notes", SECOND.upper()):
        (tmp_path / strange).mkdir()
    (tmp_path / f".new-{THIRD}").symlink_to(tmp_path / "notes")
    incidents(tmp_path, keep=1).adopt()
    assert names(tmp_path) == sorted([".new-x", "notes", SECOND.upper(), f".new-{THIRD}"])
    incidents(tmp_path / "not there").adopt()


def test_what_is_no_incident_is_neither_counted_nor_removed_nor_shown(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FIRST).symlink_to(tmp_path / "elsewhere")
    (tmp_path / SECOND).touch()
    one = incidents(tmp_path, keep=1)
    assert one.keep(THIRD, FILES)
    assert names(tmp_path) == [FIRST, SECOND, THIRD, "elsewhere"]
    assert [told["id"] for told in one.listed()] == [THIRD]


def test_an_id_a_beginning_and_last_find_one_and_a_path_finds_none(tmp_path: Path) -> None:
    kept = incidents(tmp_path / "incidents")
    for name in (FIRST, SECOND, f"{SECOND}-more"):
        kept.keep(name, FILES)
    assert kept.find("last").name == f"{SECOND}-more"
    assert kept.find(FIRST[:15]).name == FIRST
    assert kept.find(SECOND).name == SECOND
    for wanted in ("", "2026"):
        with pytest.raises(NoIncidentError, match="begins 3 incidents"):
            kept.find(wanted)
    for wanted in ("..", "../incidents", f"{FIRST}/incident.json", "/etc", f"{FIRST}\0", "LAST"):
        with pytest.raises(NoIncidentError, match="there is no incident"):
            kept.find(wanted)


def test_a_document_tells_its_folder_and_files_too(tmp_path: Path) -> None:
    kept = incidents(tmp_path)
    kept.keep(FIRST, FILES)
    assert kept.document("last") == {
        "attempt": 1,
        "folder": str(tmp_path / FIRST),
        "files": {"engine.log": 1000, "incident.json": 14},
    }


def test_an_archive_has_plain_files_only_and_has_an_end(tmp_path: Path) -> None:
    kept = incidents(tmp_path)
    kept.keep(FIRST, FILES)
    (tmp_path / FIRST / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / FIRST / "pipe")
    huge = tmp_path / FIRST / "huge"
    huge.touch()
    os.truncate(huge, 100 * MOST_BYTES)
    name, packed = kept.archive("last")
    assert name == FIRST
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [
        f"{FIRST}/{file}" for file in ("engine.log", "huge", "incident.json")
    ]
    assert all(member.isreg() and member.mode == 0o640 for member in members)
    assert sum(member.size for member in members) <= 2 * MOST_BYTES


def test_on_a_full_or_read_only_disk_it_is_said_once_and_nothing_is_left(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with small_disk(tmp_path) as disk:
        kept = incidents(disk.folder / "incidents")
        assert kept.keep(FIRST, FILES)
        disk.fill()
        assert not kept.keep(SECOND, {"engine.log": b"x" * 100_000, **FILES})
        assert names(disk.folder / "incidents") == [FIRST]
        disk.free()
        disk.read_only()
        assert not kept.keep(THIRD, FILES)
        assert names(disk.folder / "incidents") == [FIRST]
    assert [(told["event"], told["log_level"], told["incident"]) for told in logged] == [
        ("incident.failed", "warning", SECOND),
        ("incident.failed", "warning", THIRD),
    ]
    assert "no space left on device" in logged[0]["reason"]
    assert "read-only file system" in logged[1]["reason"]


def test_where_the_folder_cannot_be_it_is_said(tmp_path: Path, logged: list[EventDict]) -> None:
    (tmp_path / "file").touch()
    kept = incidents(tmp_path / "file" / "incidents")
    kept.adopt()
    assert not kept.keep(FIRST, FILES)
    assert "not a directory" in logged[-1]["reason"]
    assert {told["event"] for told in logged} == {"incident.failed"}


def test_one_that_cannot_be_read_is_told_so_in_the_list(tmp_path: Path) -> None:
    kept = incidents(tmp_path)
    whole = {"incident.json": json.dumps({"attempt": 1, "at": "", "rung": "", "phase": "", "outcome": ""}).encode()}
    kept.keep(FIRST, whole)
    kept.keep(SECOND, {"incident.json": b"nonsense"})
    kept.keep(THIRD, {"engine.log": b""})
    assert ["unreadable" in told for told in kept.listed()] == [True, True, True]


def test_many_that_are_kept_at_once_are_all_whole(tmp_path: Path) -> None:
    kept = incidents(tmp_path, keep=8)
    wanted = [f"20261124T21050{n}Z-a{n}-engine-exited" for n in range(8)]
    threads = [threading.Thread(target=kept.keep, args=(name, FILES)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == wanted
