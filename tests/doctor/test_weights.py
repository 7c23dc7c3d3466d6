"""The model's files on a real disk, and the page cache of the real kernel."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from mgpu_llm.doctor import account, weights
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.page_cache import resident_bytes
from mgpu_llm.doctor.system import System
from mgpu_llm.doctor.weights import Speed
from tests.doctor.hosts import levels, named

ROOT = os.geteuid() == 0
MIB = 1 << 20


@pytest.fixture
def me() -> Account:
    return account.account("root") if ROOT else account.account(None)


def shard(folder: Path, name: str, size: int = 4096) -> Path:
    """A whole file of one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = folder / name
    file.write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(size))
    return file


def model(folder: Path, *names: str) -> list[Path]:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return [shard(folder, name) for name in names or ("model.safetensors",)]


def test_files_that_are_whole_and_readable_are_well(tmp_path: Path, me: Account) -> None:
    files = model(tmp_path, "a.safetensors", "b.safetensors")
    found = list(weights.check(tmp_path, files, me, tokenizer=True))
    assert levels(found) == {"model-weights": "ok", "model-access": "ok"}


def test_each_file_that_cannot_be_loaded_is_named_with_why(tmp_path: Path, me: Account) -> None:
    cut, pointer, whole = model(tmp_path, "a.safetensors", "b.safetensors", "c.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "e.bin").write_text("")
    files = [cut, pointer, whole, tmp_path / "d.safetensors", tmp_path / "e.bin"]
    problem = named(list(weights.check(tmp_path, files, me, tokenizer=True)), "model-weights")
    assert problem.level == "problem"
    assert problem.seen.startswith("4 of 5 files of weights cannot be loaded: a.safetensors: it is cut off")
    assert "b.safetensors: it is a pointer of Git LFS" in problem.seen
    assert "d.safetensors: it is missing and 1 more" in problem.seen
    assert "hf download" in problem.fix


def test_a_folder_without_weights_is_a_problem(tmp_path: Path, me: Account) -> None:
    assert levels(list(weights.check(tmp_path, [], me, tokenizer=True))) == {"model-weights": "problem"}


def test_what_is_missing_of_a_hub_model_is_fetched_by_vllm(tmp_path: Path, me: Account) -> None:
    (whole,) = model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    both = [whole, tmp_path / "b.safetensors"]
    found = list(weights.check(tmp_path, both, me, tokenizer=True, hub_id="org/name"))
    assert levels(found) == {"model-fetched": "warning", "model-weights": "ok", "model-access": "ok"}
    assert "one file of weights of org/name" in named(found, "model-fetched").seen
    assert levels(list(weights.check(tmp_path, [], me, tokenizer=True, hub_id="org/name"))) == {
        "model-fetched": "warning"
    }
    whole.write_bytes(whole.read_bytes()[:-1])
    problem = named(list(weights.check(tmp_path, [whole], me, tokenizer=False, hub_id="org/name")), "model-weights")
    assert (problem.level, "hf download org/name --force-download" in problem.fix) == ("problem", True)


def test_a_missing_tokenizer_is_told_unless_another_is_named(tmp_path: Path, me: Account) -> None:
    files = model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert named(list(weights.check(tmp_path, files, me, tokenizer=True)), "model-tokenizer").level == "warning"
    assert "model-tokenizer" not in levels(list(weights.check(tmp_path, files, me, tokenizer=False)))


@pytest.mark.skipif(not ROOT, reason="only root can look as another user")
def test_files_that_the_services_user_may_not_read_are_a_problem(tmp_path: Path) -> None:
    files = model(tmp_path)
    files[0].chmod(0o600)
    problem = named(list(weights.check(tmp_path, files, account.account("nobody"), tokenizer=True)), "model-access")
    assert problem.level == "problem"
    assert f"setfacl -R -L -m u:nobody:rX {tmp_path}" in problem.fix


def test_the_page_cache_is_counted_without_reading_into_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 * MIB))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dropped = resident_bytes(file)
        assert dropped is not None
        assert dropped < 8 * MIB
        assert resident_bytes(file) == dropped
        opened.read()
    assert resident_bytes(file) == 8 * MIB


def test_what_is_empty_or_missing_has_nothing_in_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    assert resident_bytes(tmp_path / "empty") == 0
    assert resident_bytes(tmp_path / "missing") is None


def test_a_file_is_read_past_the_page_cache_up_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(9 * MIB))
    try:
        speed = weights.measure(file)
    except OSError:
        pytest.skip("this file system reads only through the page cache")
    assert speed.read_bytes == 9 * MIB
    assert speed.bytes_per_s > 0


def test_a_measurement_ends_after_a_second(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(9 * MIB))
    ticks = iter([0.0, 0.0, 1.5, 2.0])
    try:
        speed = weights.measure(file, lambda: next(ticks))
    except OSError:
        pytest.skip("this file system reads only through the page cache")
    assert (speed.read_bytes, speed.took_s) == (4 * MIB, 2.0)


@pytest.mark.parametrize(
    ("left", "level"), [(140 << 30, "warning"), (10 << 30, "ok"), (0, "ok")], ids=["long", "short", "all cached"]
)
def test_a_load_that_would_take_long_is_told(left: int, level: str) -> None:
    assert weights.rate(Speed(read_bytes=200 * MIB, took_s=1.0), left, "nfs4", remote=True).level == level


def test_a_file_of_which_nothing_came_tells_no_speed() -> None:
    assert weights.rate(Speed(read_bytes=0, took_s=1.0), 1, "ext4", remote=False).level == "unknown"


def test_a_file_that_soon_ends_tells_no_speed() -> None:
    told = weights.rate(Speed(read_bytes=MIB, took_s=0.05), 40 << 30, "ext4", remote=False)
    assert (told.level, told.seen) == ("ok", "ext4: 40 GiB to read, in files too small to measure by")
    slow = weights.rate(Speed(read_bytes=MIB, took_s=1.2), 40 << 30, "nfs4", remote=True)
    assert slow.level == "warning"


def test_what_a_load_will_need_is_told_of_real_files(tmp_path: Path) -> None:
    files = model(tmp_path)
    found = list(weights.reading(System(), [*files, tmp_path / "missing"]))
    assert [finding.name for finding in found] == ["model-cached", "model-speed"]
    assert list(weights.reading(System(), [])) == []
