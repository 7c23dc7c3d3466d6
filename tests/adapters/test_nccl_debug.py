"""NCCL's own words, in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgpu_llm.adapters import nccl_debug


def test_nccl_is_asked_to_write_into_an_empty_folder_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "nccl"
    folder.mkdir()
    (folder / "nccl.host.1").touch()
    asked = nccl_debug.asked_for({"A": "b"}, folder)
    assert asked == {"A": "b", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%h.%p"}
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "NCCL_DEBUG_FILE"])
def test_what_the_admin_has_asked_nccl_for_stays(tmp_path: Path, name: str) -> None:
    assert nccl_debug.asked_for({name: "x"}, tmp_path / "nccl") == {name: "x"}
    assert not (tmp_path / "nccl").exists()


def test_without_a_place_for_the_folder_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert nccl_debug.asked_for({"A": "b"}, tmp_path / "file" / "nccl") == {"A": "b"}


def test_the_ends_of_the_newest_files_are_read_and_nothing_that_is_no_file(tmp_path: Path) -> None:
    pattern = {"NCCL_DEBUG_FILE": f"{tmp_path}/nccl.%h.%p"}
    for number in range(nccl_debug.MOST_FILES + 2):
        file = tmp_path / f"nccl.host.{number}"
        file.write_text("x" * nccl_debug.MOST_BYTES + f"end {number}")
        os.utime(file, (number, number))
    (tmp_path / "nccl.host.dir").mkdir()
    (tmp_path / "other").touch()
    found = nccl_debug.read(pattern)
    assert sorted(found) == sorted(f"nccl.host.{number}" for number in range(2, nccl_debug.MOST_FILES + 2))
    assert all(len(text) == nccl_debug.MOST_BYTES and text.endswith(f"end {name[10:]}") for name, text in found.items())


@pytest.mark.parametrize("file", [None, "", "nccl.log", "/no/such/folder/nccl.%p"])
def test_without_files_there_is_nothing(file: str | None) -> None:
    assert nccl_debug.read({} if file is None else {"NCCL_DEBUG_FILE": file}) == {}
