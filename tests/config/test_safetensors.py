"""What the header of a safetensors file says, and what no loader would take."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mgpu_llm.config.safetensors import LONGEST_HEADER, BrokenFileError, read_header
from mgpu_llm.core.sharding import Tensor
from tests.support.checkpoints import write_file

ONE = Tensor(name="a.weight", dtype="BF16", shape=(4, 3), bytes=24)
OTHER = Tensor(name="a.bias", dtype="F32", shape=(), bytes=4)
NEW_KIND = Tensor(name="b", dtype="F5_NEW", shape=(9,), bytes=7)


def raw(file: Path, header: object, data: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


def why(file: Path) -> str:
    with pytest.raises(BrokenFileError) as raised:
        read_header(file)
    return str(raised.value)


def test_a_header_tells_each_tensor_and_only_the_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    read = write_file(file, [ONE, OTHER, NEW_KIND])
    header = read_header(file)
    assert header.tensors == (ONE, OTHER, NEW_KIND)
    assert header.read_bytes == read < file.stat().st_size


def test_of_a_file_of_a_hundred_gigabytes_a_few_hundred_bytes_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_file(file, [Tensor(name="a", dtype="U8", shape=(10**11,), bytes=10**11)])
    assert read_header(file).read_bytes < 300


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    assert read_header(raw(tmp_path / "x", {})).tensors == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\x05\x00", "it ends within its header"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00{}", "it ends within its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS, not the file itself"),
        ((LONGEST_HEADER + 1).to_bytes(8, "little"), "its header would have 100000001 bytes: it is no safetensors file"),
        (b"<!DOCTYPE html>", f"its header would have {int.from_bytes(b'<!DOCTYP', 'little')} bytes: it is no safetensors file"),
    ],
    ids=["empty", "short", "cut header", "lfs", "too long", "a web page"],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_called_by_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    assert why(file) == reason


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "its header is not JSON"),
        (b"\xff\xfe\xfd", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ([], "its header is JSON, but not an object"),
        ({"a": 1}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [1]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [True], "data_offsets": [0, 2]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [1] * 65, "data_offsets": [0, 2]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [2**63], "data_offsets": [0, 2]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 0]}}, "its header is wrong about 'a'"),
        ({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 2]}}, "its header is wrong about 'a': 2 bytes for F16 [3]"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path: Path, header: object, reason: str) -> None:
    assert why(raw(tmp_path / "x", header, 2)) == reason


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors"])
def test_what_no_file_can_be_called_is_no_file(tmp_path: Path, name: str) -> None:
    assert why(tmp_path / name) == "no file can be called so"


def test_a_file_must_be_as_long_as_its_header_says(tmp_path: Path) -> None:
    file = tmp_path / "x"
    whole = write_file(file, [ONE]) + 24
    os.truncate(file, whole - 1)
    assert why(file) == f"it is cut off: it has {whole - 1} bytes, and its header says {whole}"
    os.truncate(file, whole + 1)
    assert why(file) == f"it is too long: it has {whole + 1} bytes, and its header says {whole}"


def test_a_pipe_is_not_waited_for_and_a_folder_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert why(tmp_path / "pipe") == "it is no regular file"
    with pytest.raises(OSError, match="directory"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")
