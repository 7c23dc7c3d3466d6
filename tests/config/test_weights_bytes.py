"""How large the model's weight files are, as far as it can be told without loading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgpu_llm.config.model import weights_bytes
from tests.config.loading import config, unprivileged


def model(
    folder: Path, files: dict[str, int], index: object = None, *, name: str = "model.safetensors.index.json"
) -> Path:
    """A folder with files of these sizes, sparse, and perhaps an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, size in files.items():
        with (folder / file).open("wb") as written:
            written.truncate(size)
    if index is not None:
        (folder / name).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def size_of(folder: Path, *, args: str = "[]") -> int | None:
    return weights_bytes(config(f"model.path = '{folder}'\nengine.args = {args}"), {})


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"model.safetensors": 15_200_000_000}, 15_200_000_000),
        ({"model-00001-of-00002.safetensors": 70, "model-00002-of-00002.safetensors": 30, "consolidated.safetensors": 99}, 100),
        ({"weights.safetensors": 7, "pytorch_model.bin": 99}, 7),
        ({"pytorch_model.bin": 5, "more.bin": 6, "x.pt": 99}, 11),
        ({"x.pt": 3, "y.gguf": 99}, 3),
        ({"y.gguf": 4, "config.json": 99}, 4),
    ],
)  # fmt: skip
def test_the_files_of_the_first_kind_that_there_is_are_counted(
    tmp_path: Path, files: dict[str, int], size: int
) -> None:
    assert size_of(model(tmp_path, files)) == size


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_says_which_files_are_read_and_each_counts_once(tmp_path: Path, name: str) -> None:
    index = {
        "weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c.weight": "one.safetensors"}
    }
    files = {"one.safetensors": 10, "two.safetensors": 20, "consolidated.safetensors": 99}
    assert size_of(model(tmp_path, files, index, name=name)) == 30


def test_files_may_be_links_into_a_cache(tmp_path: Path) -> None:
    blob = model(tmp_path / "blobs", {"abc": 42}) / "abc"
    folder = model(tmp_path / "snapshot", {})
    (folder / "model.safetensors").symlink_to(blob)
    assert size_of(folder) == 42


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ({"config.json": 5}, None),
        ({"model.safetensors": 0}, None),
        ({"one.safetensors": 5}, {"weight_map": {"a": "one.safetensors", "b": "missing.safetensors"}}),
        ({"one.safetensors": 5}, {"weight_map": ["one.safetensors"]}),
        ({"one.safetensors": 5}, {}),
        ({"one.safetensors": 5}, "{"),
        ({"one.safetensors": 5}, "[]"),
    ],
    ids=["no weights", "empty", "a shard missing", "no map", "no map at all", "no JSON", "no object"],
)
def test_where_it_cannot_be_told_it_is_unknown(tmp_path: Path, files: dict[str, int], index: object) -> None:
    assert size_of(model(tmp_path, files, index)) is None


@pytest.mark.parametrize("path", ["/nowhere/at/all", "org/name", "s3://bucket/model", ""])
def test_a_model_that_is_not_on_this_host_has_no_size(tmp_path: Path, path: str) -> None:
    assert weights_bytes(config(f"model.path = '{path}'"), {"HF_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize("args", ['["--load-format", "dummy"]', '["--load-format=dummy"]'])
def test_weights_that_are_not_read_have_no_size(tmp_path: Path, args: str) -> None:
    folder = model(tmp_path, {"model.safetensors": 5})
    assert size_of(folder, args=args) is None
    assert size_of(folder, args='["--load-format", "safetensors"]') == 5


def test_a_folder_that_may_not_be_read_has_no_size(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"one.safetensors": 5}, {"weight_map": {"a": "one.safetensors"}})
    folder.chmod(0o700)
    with unprivileged():
        assert size_of(folder) is None


def test_the_size_of_a_hub_model_comes_from_the_local_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    model(repository / "snapshots" / "abc", {"model.safetensors": 8})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    hub = "model.path = 'org/name'"
    assert weights_bytes(config(hub), {"HF_HUB_CACHE": str(tmp_path)}) == 8
    assert weights_bytes(config(f"{hub}\nengine.env.HF_HUB_CACHE = '{tmp_path}'"), {}) == 8
