from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgpu_llm.config.model import local_path, model_heads, read_model
from mgpu_llm.core.ladder import Heads
from tests.config.loading import config


def write_model(folder: Path, settings: object, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        (
            {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8},
            Heads(attention=32, key_value=8),
        ),
        ({"model_type": "gpt2", "n_head": 12}, Heads(attention=12)),
        ({"architectures": ["MPT"], "n_heads": 16}, Heads(attention=16)),
        (
            {"model_type": "chatglm", "num_attention_heads": 32, "multi_query_group_num": 2},
            Heads(attention=32, key_value=2),
        ),
        ({"model_type": "deci", "num_attention_heads": 64, "num_key_value_heads": None}, Heads(attention=64)),
        ({"model_type": "openelm", "num_attention_heads": [8, 16]}, Heads()),
        ({"model_type": "mamba"}, Heads()),
        (
            {
                "model_type": "qwen2_vl",
                "num_attention_heads": 5,
                "vision_config": {"num_attention_heads": 3},
                "text_config": {"num_attention_heads": 28, "num_key_value_heads": 4},
            },
            Heads(attention=28, key_value=4),
        ),
        (
            {"model_type": "omni", "thinker_config": {"text_config": {"num_attention_heads": 28}}},
            Heads(attention=28),
        ),
        ({"model_type": "x", "text_config": {}, "num_attention_heads": 5}, Heads(attention=5)),
    ],
)
def test_the_heads_are_those_of_the_language_model(tmp_path: Path, settings: object, heads: Heads) -> None:
    assert read_model(write_model(tmp_path, settings)) == heads


def test_mistrals_own_format_is_read_where_there_is_no_config_json(tmp_path: Path) -> None:
    write_model(tmp_path, {"n_heads": 32, "n_kv_heads": 8}, "params.json")
    assert read_model(tmp_path) == Heads(attention=32, key_value=8)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "it is not JSON: expecting property name enclosed in double quotes in line 1"),
        (b"[]", "it is JSON, but not an object"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b"\xff\xfe\xff", "it is not text"),
        (b'{"n_layer": 1}', 'it has neither "model_type" nor "architectures"'),
    ],
)
def test_a_config_json_that_is_none_says_why(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_model(tmp_path)
    assert str(caught.value) == why


def test_paths_are_told_from_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/u")
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert local_path("/m") == Path("/m")
    assert local_path("./m") == tmp_path / "m"
    assert local_path("~/m") == Path("/home/u/m")
    assert local_path("~nobody-of-this-name/m") == tmp_path / "~nobody-of-this-name/m"
    assert local_path("org/here") == tmp_path / "org/here"
    assert local_path("org/name") is None
    assert local_path("") is None
    assert local_path("x" * 5000) is None


def test_the_heads_of_a_hub_model_come_from_the_local_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    write_model(repository / "snapshots" / "abc", {"model_type": "llama", "num_attention_heads": 6})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    hub = config("model.path = 'org/name'")
    assert model_heads(hub, {"HF_HUB_CACHE": str(tmp_path)}) == Heads(attention=6)
    assert model_heads(config(f"model.path = 'org/name'\nengine.env.HF_HUB_CACHE = '{tmp_path}'"), {}).attention == 6


@pytest.mark.parametrize(
    ("below", "environ"),
    [
        ("hub", {"HF_HOME": "{}"}),
        ("huggingface/hub", {"XDG_CACHE_HOME": "{}"}),
        (".cache/huggingface/hub", {"HOME": "{}"}),
    ],
)
def test_the_cache_is_where_the_hubs_library_keeps_it(tmp_path: Path, below: str, environ: dict[str, str]) -> None:
    repository = tmp_path / below / "models--org--name"
    write_model(repository / "snapshots" / "abc", {"model_type": "llama", "num_attention_heads": 6})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    there = {name: value.format(tmp_path) for name, value in environ.items()}
    assert model_heads(config("model.path = 'org/name'"), there) == Heads(attention=6)


@pytest.mark.parametrize("path", ["org/name", "s3://bucket/model", "/nowhere/at/all", ""])
def test_the_heads_of_a_model_that_cannot_be_read_are_unknown(tmp_path: Path, path: str) -> None:
    assert model_heads(config(f"model.path = '{path}'"), {"HF_HOME": str(tmp_path)}) == Heads()
