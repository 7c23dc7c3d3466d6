"""The JSON schema of the config: it describes every key, and refuses what parsing refuses."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mgpu_llm.config.descriptions import SHIPPED
from mgpu_llm.config.json_schema import json_schema
from mgpu_llm.config.schema import Config, tables
from tests.config.loading import problems

SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
RUNG = '[[ladder.rungs]]\nname = "a"\ngpus = 2\n'


def refused(text: str) -> bool:
    return not VALIDATOR.is_valid(tomllib.loads(text))


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    match node:
        case dict():
            yield node
            for held in node.values():
                yield from nodes(held)
        case list():
            for held in node:
                yield from nodes(held)
        case _:
            return


def table(name: str) -> dict[str, Any]:
    node = SCHEMA
    for part in name.split("."):
        node = node["properties"][part]
    return dict(node.get("items", node))


def test_it_is_a_schema_of_draft_2020_12_that_json_can_carry() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_the_shipped_file_is_valid() -> None:
    assert list(VALIDATOR.iter_errors(tomllib.loads(SHIPPED.read_text()))) == []
    assert not refused(RUNG)


@pytest.mark.parametrize("name", list(tables()))
def test_every_key_of_a_table_is_in_it_with_a_description_and_no_other_is_allowed(name: str) -> None:
    found = table(name)
    assert set(found["properties"]) == set(tables()[name].model_fields)
    assert found["additionalProperties"] is False
    assert [key for key, node in found["properties"].items() if not node["description"]] == []
    assert SCHEMA["properties"][name.partition(".")[0]]["description"]


def test_every_default_is_that_of_the_config() -> None:
    defaults = json.loads(json.dumps(dict(Config()), default=dict))
    for name in Config.model_fields:
        for key, node in table(name)["properties"].items():
            assert node.get("default", defaults[name][key]) == defaults[name][key], (name, key)
            assert "default" in node or not defaults[name][key], (name, key)


def test_nothing_in_it_is_of_python_or_refers_elsewhere() -> None:
    for node in nodes(SCHEMA):
        assert node.get("type") != "null"
        assert "$ref" not in node


@pytest.mark.parametrize(
    "wrong",
    [
        "no_such = 1",
        "gpus.no_such = 1",
        "model = 1",
        "model.path = 1",
        'model.path = "-x"',
        'model.path = " x"',
        'model.path = "x\\u0007"',
        'engine.command = "vllm serve"',
        "engine.port = 0",
        "engine.port = 65536",
        'engine.port = "8000"',
        'engine.args = ["--max-model-len 8192"]',
        'engine.args = ["a\\u0000"]',
        "engine.args = [1]",
        "engine.env.A = 1",
        'engine.env."A B" = "1"',
        'gpus.use = "some"',
        "gpus.use = []",
        "gpus.use = [-1]",
        "gpus.use = [1, 1]",
        'gpus.use = ["2"]',
        'gpus.spares = "all"',
        "gpus.shared = 1",
        "gpus.lock_dirs = []",
        'gpus.lock_dirs = ["run"]',
        "gpus.tensor_parallel = 0",
        'gpus.tensor_parallel = "all"',
        "gpus.memory_utilisation = 90",
        "gpus.memory_utilisation = 0",
        "gpus.memory_utilisation = true",
        "gpus.utilisation_step = 1",
        'preflight.mode = "on"',
        "preflight.deadline = 4",
        "patience.weights = 0",
        'patience.weights = "25 s"',
        "heartbeat.learn_factor = 1",
        "serving.deaths_window = 604801",
        "retries.attempts = 101",
        "retries.jitter = 2",
        "stop.grace = -1",
        "records.keep = -1",
        "incidents.max_size = 0",
        'metrics.listen = "19400"',
        'metrics.listen = "localhost:19400"',
        'daemon.log_level = "trace"',
        'daemon.runtime_dir = "run"',
        f'daemon.runtime_dir = "/{"a" * 94}"',
        'ladder.pin = ["everything"]',
        'ladder.may_change = "dtype"',
        "ladder.rungs = [{ gpus = 2 }]",
        f"{RUNG}no_such = 1",
        RUNG.replace('"a"', '"A b"'),
        RUNG.replace("gpus = 2", "gpus = 0"),
        RUNG.replace("gpus = 2", "utilisation = 2"),
    ],
)
def test_what_parsing_refuses_of_a_value_it_refuses_too(wrong: str) -> None:
    assert problems(wrong) != []
    assert refused(wrong)


@pytest.mark.parametrize(
    "right",
    [
        'model.path = "/srv/a model"',
        'engine.command = ["/opt/vllm/bin/vllm", "serve"]',
        'engine.args = ["--max-model-len", "8192", "--served-model-name=a b", "{\\n}"]',
        'engine.env = { HF_HUB_OFFLINE = "1" }',
        "gpus.use = [2, 3]\ngpus.spares = [0]",
        'gpus.use = ["GPU-5e0c"]',
        "gpus.tensor_parallel = 2",
        'metrics.listen = "off"',
        'metrics.listen = "[::1]:19400"',
        "patience.boot = 7",
        'ladder.may_change = ["dtype"]',
        "ladder.rungs = []",
    ],
)
def test_what_parsing_takes_it_takes_too(right: str) -> None:
    assert problems(right) == []
    assert not refused(right)
