"""The toy checkpoint is whole or absent, the same every time, and what the engine's own libraries read."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.make_engine_env import PYTHON
from tests.support.toy_model import Shape, write_toy_model


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_shape_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    write_toy_model(tmp_path / "one", Shape())
    write_toy_model(tmp_path / "two", Shape())
    write_toy_model(tmp_path / "three", Shape(seed=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "three")


def test_a_checkpoint_that_is_there_is_left_alone_and_one_of_another_shape_is_replaced(tmp_path: Path) -> None:
    model = tmp_path / "toy"
    assert write_toy_model(model, Shape())
    first = (model / "config.json").stat()
    assert not write_toy_model(model, Shape())
    assert (model / "config.json").stat() == first
    assert write_toy_model(model, Shape(shards=2))
    assert len(list(model.glob("*.safetensors"))) == 2


def test_a_folder_with_something_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a toy model"):
        write_toy_model(tmp_path, Shape())
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_write_that_fails_leaves_neither_a_checkpoint_nor_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(folder: Path, shape: Shape) -> None:
        (folder / "model-00001-of-00008.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tests.support.toy_model._write_weights", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_toy_model(tmp_path / "toy", Shape())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"hidden": 100}, {"kv_heads": 3}, {"shards": 9}, {"shards": 0}])
def test_a_shape_that_vllm_would_refuse_is_refused_with_its_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot shape a checkpoint: .*\d"):
        Shape(**wrong)


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_every_tensor_is_in_the_shard_that_the_index_names_and_fills_it_without_a_gap(
    tmp_path: Path, shards: int
) -> None:
    write_toy_model(tmp_path / "toy", Shape(shards=shards))
    index = json.loads((tmp_path / "toy/model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for file in (tmp_path / "toy").glob("*.safetensors"):
        data = file.read_bytes()
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        header.pop("__metadata__")
        spans = sorted(entry["data_offsets"] for entry in header.values())
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == len(data) - 8 - header_bytes
        found |= dict.fromkeys(header, file.name)
    assert found == index["weight_map"]
    assert len(found) == 8 * 12 + 3


READ_IT = """
import json, pathlib, sys
import safetensors, tokenizers
folder = pathlib.Path(sys.argv[1])
shapes = {}
for file in folder.glob("*.safetensors"):
    with safetensors.safe_open(file, "numpy") as opened:
        shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}
tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
said = [tokenizer.decode(tokenizer.encode(text).ids) for text in json.loads(sys.argv[2])]
print(json.dumps({"said": said, "tokens": len(tokenizer.encode("naïve").ids), "shapes": shapes}))
"""


@pytest.mark.engine
def test_the_engines_own_libraries_read_the_weights_and_the_tokenizer_says_any_text(tmp_path: Path) -> None:
    write_toy_model(tmp_path / "toy", Shape())
    texts = ["Hello, world!", "naïve — 北京 🚀", " \t\n\x00~\x7f"]
    run = subprocess.run(
        [PYTHON, "-c", READ_IT, tmp_path / "toy", json.dumps(texts)], capture_output=True, text=True, check=True
    )
    read = json.loads(run.stdout)
    assert read["said"] == texts
    assert read["tokens"] == len("naïve".encode())
    assert read["shapes"]["model.layers.7.self_attn.k_proj.weight"] == [64, 128]
    assert read["shapes"]["lm_head.weight"] == [264, 128]
