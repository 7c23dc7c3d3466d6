"""The remembered rung with real files, folders and disks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters.memory.known_good import KnownGoodRung
from mgpu_llm.core.known_good import KnownGood, from_json, to_json
from tests.support.small_disk import small_disk


def known(rung: str = "p2p-off") -> KnownGood:
    key = {"driver": "550.54", "config": "0123456789abcdef"}
    return KnownGood(rung=rung, since="2026-11-24T21:05:00Z", cause="p2p-stall", key=key, starts=3, boot="b" * 36)


def test_a_rung_is_remembered_at_once_and_by_the_next_daemon(tmp_path: Path, logged: list[EventDict]) -> None:
    rung = KnownGoodRung(tmp_path)
    assert rung.known is None
    rung.remember(known("p2p-off"))
    rung.remember(known("p2p-off+tp-1"))
    assert rung.known == known("p2p-off+tp-1")
    rung.close()
    assert KnownGoodRung(tmp_path).known == known("p2p-off+tp-1")
    assert [path.name for path in tmp_path.iterdir()] == ["known-good.json"]
    assert stat.S_IMODE((tmp_path / "known-good.json").stat().st_mode) == 0o640
    assert logged == []


def test_a_rung_that_is_forgotten_leaves_no_file(tmp_path: Path, logged: list[EventDict]) -> None:
    (tmp_path / "known-good.json").write_text(to_json(known()))
    rung = KnownGoodRung(tmp_path)
    assert rung.known == known()
    rung.remember(None)
    assert rung.known is None
    rung.close()
    assert list(tmp_path.iterdir()) == []
    assert logged == []


def test_without_a_folder_the_rung_is_remembered_until_the_daemon_ends(logged: list[EventDict]) -> None:
    rung = KnownGoodRung(None)
    assert rung.known is None
    rung.remember(known())
    rung.close()
    assert rung.known == known()
    assert logged == []


def _text(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_text(to_json(known())[:40]), "it is not JSON: "),
        (_text(to_json(known()).replace('"format": 1', '"format": 2')), "it is not of format 1"),
        (_text(to_json(known()).replace("p2p-off", "p2p\\noff")), 'it has no text "rung"'),
        (os.mkfifo, "it is no plain file"),
    ],
    ids=["cut", "of-the-future", "two-lines", "a-fifo"],
)
def test_a_file_that_is_none_of_ours_is_moved_aside_with_one_warning_and_nothing_is_known(
    tmp_path: Path, logged: list[EventDict], spoil: Callable[[Path], object], why: str
) -> None:
    spoil(tmp_path / "known-good.json")
    rung = KnownGoodRung(tmp_path)
    assert rung.known is None
    rung.remember(known())
    rung.close()
    assert from_json((tmp_path / "known-good.json").read_text()) == known()
    (warning,) = logged
    assert (warning["event"], warning["log_level"]) == ("state.broken", "warning")
    assert warning["reason"].startswith(f"cannot use '{tmp_path}/known-good.json': {why}")
    assert warning["moved_to"] == f"{tmp_path}/known-good.json.broken"
    assert os.path.lexists(tmp_path / "known-good.json.broken")


def test_on_a_full_disk_the_old_rung_stays_whole_and_the_new_one_lasts_as_long_as_the_daemon(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with small_disk(tmp_path) as disk:
        rung = KnownGoodRung(disk.folder)
        rung.remember(known("p2p-off"))
        rung.close()
        disk.fill()
        for _ in range(2):
            rung.remember(known("p2p-off+tp-1"))
            rung.close()
        assert rung.known == known("p2p-off+tp-1")
        assert KnownGoodRung(disk.folder).known == known("p2p-off")
    (warning,) = logged
    assert (warning["event"], warning["log_level"]) == ("state.failed", "warning")
    assert warning["reason"].endswith("known-good.json': no space left on device")
