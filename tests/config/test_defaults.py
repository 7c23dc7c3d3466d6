"""etc/mgpu-llm.toml is the documentation of the config: it must be right and whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from mgpu_llm.config.parse import load
from mgpu_llm.config.schema import Config, tables
from mgpu_llm.core.ladder import Ladder
from mgpu_llm.core.launch import Launch, Server
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.states import Policy
from tests.config.loading import config

SHIPPED = Path(__file__).parents[2] / "etc" / "mgpu-llm.toml"


def test_the_shipped_file_parses_to_exactly_the_defaults() -> None:
    loaded = load(SHIPPED)
    assert loaded.problems == ()
    assert loaded.config == Config()
    assert loaded.config.ladder.rungs is None


def test_the_shipped_file_sets_every_key_but_those_of_rungs() -> None:
    written = tomllib.loads(SHIPPED.read_text())
    for name, table in tables().items():
        if name != "ladder.rungs":
            assert set(written[name]) == set(table.model_fields) - {"rungs"}, name


def test_the_shipped_file_shows_every_key_of_a_rung_in_an_example_that_parses() -> None:
    text = SHIPPED.read_text()
    example = text[text.index("# [[ladder.rungs]]\n") :]
    rungs = config(re.sub(r"^# ?", "", example, flags=re.MULTILINE)).ladder.rungs
    assert rungs is not None
    assert set().union(*(rung.model_fields_set for rung in rungs)) == set(tables()["ladder.rungs"].model_fields)


def test_no_rungs_are_the_built_in_ones_and_empty_ones_are_none() -> None:
    assert config("").ladder.rungs is None
    assert config("ladder.rungs = []").ladder.rungs == ()


def test_the_shipped_file_names_every_area_that_the_ladder_may_change() -> None:
    text = SHIPPED.read_text()
    told = text[text.index("[ladder]") :]
    told = told[: told.index("remember = ")]
    assert [area for area in Area if f'"{area}"' not in told] == []


def test_the_defaults_of_retries_and_of_the_ladder_are_those_of_the_core() -> None:
    told, policy = Config(), Policy(ladder=Ladder(base=Launch(gpus=None, tensor_parallel=1, utilisation=None)))
    assert (told.retries.per_cause, told.ladder.retry_up_after) == (policy.tries_per_cause, policy.up_after)
    gpus, ladder = told.gpus, policy.ladder
    assert (gpus.utilisation_step, gpus.utilisation_floor) == (ladder.step, ladder.floor)
    assert gpus.utilisation_ceiling == ladder.ceiling


def test_the_defaults_of_host_and_port_are_those_of_the_core() -> None:
    server = Server(command=(), model="")
    assert (Config().engine.host, Config().engine.port) == (server.host, server.port)


def test_numbers_may_be_written_as_integers_or_floats() -> None:
    assert config("patience.boot = 7").patience.boot == config("patience.boot = 7.0").patience.boot == 7.0


def test_arguments_and_variables_stay_out_of_repr_as_they_may_hold_an_api_key() -> None:
    secret = config("""
        engine = { args = ["--api-key", "sk-1"], env = { VLLM_API_KEY = "sk-2" } }
        ladder.rungs = [{ name = "a", args = ["--api-key=sk-3"], env = { K = "sk-4" } }]
    """)
    assert secret.engine.args == ("--api-key", "sk-1")
    assert "sk-" not in repr(secret)


def test_parsing_and_checking_import_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, mgpu_llm.config.checks, mgpu_llm.config.launching;"
        "print([name for name in ('aiohttp', 'pynvml', 'rich', 'vllm', 'torch') if name in sys.modules])"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == "[]"
