"""How long the context is, as far as it can be told without loading the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config.context import context_length
from tests.config.loading import config
from tests.config.test_model import write_model

LLAMA = {"model_type": "llama", "max_position_embeddings": 131_072}


def length_of(path: Path | str, args: str = "[]") -> int | None:
    return context_length(config(f"model.path = '{path}'\nengine.args = {args}"), {"HOME": "/nowhere"})


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("25.6k", 25_600),
        ("1M", 1_048_576),
        ("1m", 1_000_000),
        ("auto", None),
        ("-1", None),
        ("0", None),
        ("1.5K", None),
        ("8.5", None),
        ("long", None),
        ("", None),
    ],
)
def test_max_model_len_is_read_as_vllm_reads_it(tmp_path: Path, written: str, tokens: int | None) -> None:
    model = write_model(tmp_path, LLAMA)
    assert length_of(model, f"['--max-model-len', '{written}']") == tokens
    assert length_of(model, f"['--max_model_len={written}']") == tokens


def test_without_it_the_model_says_how_long_it_was_made_for(tmp_path: Path) -> None:
    assert length_of(write_model(tmp_path, LLAMA)) == 131_072


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 8192, "seq_length": 4096}, 4096),
        ({"max_position_embeddings": 8192, "model_max_length": 131_072}, 131_072),
        ({"model_max_length": 2048}, 2048),
        ({"max_position_embeddings": 512, "text_config": {"max_position_embeddings": 32_768}}, 32_768),
        ({"max_position_embeddings": 4096, "vision_config": {"max_position_embeddings": 77}}, 4096),
        ({"max_position_embeddings": 4096, "text_config": {}}, 4096),
        ({"max_position_embeddings": "long", "seq_length": True, "seq_len": -1}, None),
        ({}, None),
    ],
)
def test_the_length_is_that_of_the_language_model(tmp_path: Path, settings: object, tokens: int | None) -> None:
    assert length_of(write_model(tmp_path, settings)) == tokens


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_scaling": None}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4096),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 4096),
        ({"rope_parameters": {"rope_theta": 1e6}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"rope_scaling": {"rope_type": ["?"]}}, None),
        ({"rope_parameters": {"full": {"rope_type": "longrope"}, "sliding": {"rope_type": "default"}}}, None),
    ],
)
def test_position_embeddings_that_are_stretched_leave_it_unknown(
    tmp_path: Path, rope: dict[str, object], tokens: int | None
) -> None:
    assert length_of(write_model(tmp_path, {"max_position_embeddings": 4096, **rope})) == tokens


@pytest.mark.parametrize(
    "args", ["'--hf-overrides', '{}'", "'--rope-scaling={}'", "'--hf-config-path', 'a/b'", "'--config', '/x.yaml'"]
)
def test_arguments_that_may_change_it_leave_it_unknown_unless_it_is_written(tmp_path: Path, args: str) -> None:
    model = write_model(tmp_path, LLAMA)
    assert length_of(model, f"[{args}]") is None
    assert length_of(model, f"[{args}, '--max-model-len', '4096']") == 4096


@pytest.mark.parametrize("path", ["/nowhere/at/all", "org/name", ""])
def test_of_a_model_that_is_not_on_this_host_it_is_unknown(path: str) -> None:
    assert length_of(path) is None


def test_of_a_settings_file_that_is_none_it_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert length_of(tmp_path) is None
