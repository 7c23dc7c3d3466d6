"""The values that a config comes to, and where each is from."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import pytest

from mgpu_llm.config.effective import document
from mgpu_llm.config.schema import Config
from mgpu_llm.core import instances

SECRETS = """
engine.args = ["--api-key", "sk-one-secret", "--seed=1"]
engine.env = { HF_TOKEN = "two-secret", A = "before two-secret after" }
[[ladder.rungs]]
name = "a"
args = ["--api-key=three-secret"]
env = { VLLM_API_KEY = "four-secret" }
"""


def told(folder: Path, main: str, **drop_ins: str) -> dict[str, Any]:
    """What is told of mgpu-llm.toml with these files in conf.d."""
    (folder / "conf.d").mkdir()
    (folder / "mgpu-llm.toml").write_text(main)
    for name, text in drop_ins.items():
        (folder / "conf.d" / f"{name}.toml").write_text(text)
    return document(folder / "mgpu-llm.toml")


def setting(document: dict[str, Any], key: str) -> tuple[Any, str, str]:
    """Value, origin, and the name of the file."""
    (found,) = [setting for setting in document["settings"] if setting["key"] == key]
    return found["value"], found["origin"], Path(found["file"] or "").name


def test_each_value_is_told_with_the_file_that_said_it_last(tmp_path: Path) -> None:
    found = told(
        tmp_path,
        'gpus.use = [1]\nengine.port = 1\nengine.env.A = "1"',
        b='gpus.use = [2, "GPU-5e"]\nengine.env.B = "2"\nladder.pin = ["gpus"]',
    )
    assert setting(found, "gpus.use") == ([2, "GPU-5e"], "file", "b.toml")
    assert setting(found, "engine.port") == (1, "file", "mgpu-llm.toml")
    assert setting(found, "engine.env.A") == ("1", "file", "mgpu-llm.toml")
    assert setting(found, "engine.env.B") == ("2", "file", "b.toml")
    assert setting(found, "ladder.pin") == (["gpus"], "file", "b.toml")
    assert setting(found, "engine.host") == ("127.0.0.1", "default", "")
    assert (found["instance"], found["problems"]) == ("", [])


def test_every_key_is_told_once_and_json_carries_it(tmp_path: Path) -> None:
    found = told(tmp_path, "")
    keys = [setting["key"] for setting in found["settings"]]
    assert keys == [f"{table}.{key}" for table in Config.model_fields for key, _ in getattr(Config(), table)]
    assert {setting["origin"] for setting in found["settings"]} == {"default"}
    assert setting(found, "ladder.rungs") == (None, "default", "")
    assert json.loads(json.dumps(found)) == found


def test_secrets_are_dots_wherever_they_stand(tmp_path: Path) -> None:
    found = told(tmp_path, SECRETS)
    assert "-secret" not in json.dumps(found)
    assert setting(found, "engine.args")[0] == ["--api-key", "...", "--seed=1"]
    assert setting(found, "engine.env.HF_TOKEN")[0] == "..."
    assert setting(found, "engine.env.A")[0] == "before ... after"
    rung = {"name": "a", "env": {"VLLM_API_KEY": "..."}, "args": ["--api-key=..."]}
    assert setting(found, "ladder.rungs") == ([rung], "file", "mgpu-llm.toml")


def test_what_is_wrong_is_a_problem_and_told_at_its_default(tmp_path: Path) -> None:
    found = told(tmp_path, "engine.port = 0\ngpus.shared = true")
    assert setting(found, "engine.port") == (8000, "default", "")
    assert setting(found, "gpus.shared") == (True, "file", "mgpu-llm.toml")
    (problem,) = found["problems"]
    assert "engine.port: found 0" in problem


def test_folders_of_an_instance_are_from_its_name_unless_its_file_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "CONFIGS", PurePath(tmp_path))
    (tmp_path / "big.toml").write_text('daemon.state_dir = "/srv/state"')
    found = document(tmp_path / "big.toml")
    assert found["instance"] == "big"
    assert setting(found, "daemon.runtime_dir") == ("/run/mgpu-llm@big", "instance", "")
    assert setting(found, "daemon.state_dir") == ("/srv/state", "file", "big.toml")
