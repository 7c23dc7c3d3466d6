from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config.document import origin
from tests.config.loading import config, loaded, problems


def test_tables_merge_arrays_replace_and_the_later_file_wins() -> None:
    merged = loaded(
        'engine = { port = 1, args = ["--a"], env = { A = "1", B = "1" } }',
        b='engine = { port = 2, args = ["--b"], env = { B = "2" } }\n[model]\npath = "/m"',
    )
    assert merged.problems == ()
    assert merged.config.engine.port == 2
    assert merged.config.engine.args == ("--b",)
    assert merged.config.engine.env == {"A": "1", "B": "2"}
    assert merged.config.engine.host == "127.0.0.1"


def test_a_ladder_of_a_later_file_replaces_the_earlier_one_and_may_empty_it() -> None:
    first = '[[ladder.rungs]]\nname = "a"\ngpus = 1\n[[ladder.rungs]]\nname = "b"\ngpus = 1'
    second = loaded(first, b='[[ladder.rungs]]\nname = "c"\ngpus = 1').config.ladder.rungs
    assert second is not None
    assert [rung.name for rung in second] == ["c"]
    assert loaded(first, b="ladder.rungs = []").config.ladder.rungs == ()


def test_what_the_ladder_may_change_and_its_rungs_may_be_in_files_of_their_own() -> None:
    merged = loaded('[[ladder.rungs]]\nname = "a"\ngpus = 1', b="[ladder]\nretry_up_after = 3").config.ladder
    assert (merged.retry_up_after, [rung.name for rung in merged.rungs or ()]) == (3, ["a"])


def test_every_value_remembers_its_file() -> None:
    document = loaded("engine = { port = 1, env = { A = '1' } }", b="engine.port = 2\nstop = {}").document
    assert origin(document, ("engine", "port")) == Path("b.toml")
    assert origin(document, ("engine", "env", "A")) == Path("a.toml")
    assert origin(document, ("engine", "env", "A", "deeper")) == Path("a.toml")
    assert origin(document, ("engine",)) == Path("a.toml")
    assert origin(document, ("stop",)) == Path("b.toml")
    assert origin(document, ("gpus", "use")) is None


def test_a_problem_is_told_under_the_file_that_made_it() -> None:
    assert problems("engine.port = 0\nstop.grace = -1", b="engine.port = 70000") == [
        "a.toml: stop.grace: found -1 (integer), expected seconds from 0 to 86400 (a day)",
        "b.toml: engine.port: found 70000 (integer), expected an integer from 1 to 65535",
    ]


def test_a_value_in_a_tables_place_replaces_it_and_the_other_way_round() -> None:
    assert problems("[engine]\nport = 1", b="engine = 5") == [
        "b.toml: engine: found 5 (integer), expected a table; write [engine]"
    ]
    assert problems("engine = 5", b="[engine]\nport = 1") == []


def test_a_file_that_is_not_toml_says_where_and_leaves_the_others_to_be_parsed() -> None:
    broken = loaded("[engine]\nport 1", b="engine.port = 0")
    assert [(problem.file.name, problem.key, problem.found) for problem in broken.problems] == [
        (
            "a.toml",
            "",
            "cannot read it as TOML: expected '=' after a key in a key/value pair (at line 2, column 6)",
        ),
        ("b.toml", "engine.port", "0 (integer)"),
    ]
    assert not broken.complete


def test_a_key_twice_in_one_file_is_refused_by_toml_itself() -> None:
    assert problems("[stop]\ngrace = 1\ngrace = 2") == [
        "a.toml: cannot read it as TOML: cannot overwrite a value (at line 3, column 10)"
    ]


def test_an_empty_file_is_the_defaults() -> None:
    assert config("") == config("[engine]\n[gpus]\n[engine.env]")


@pytest.mark.parametrize("text", ["port = " + "9" * 6000, "a = " + "[" * 100_000])
def test_toml_that_python_cannot_hold_is_a_problem_of_its_file(text: str) -> None:
    (told,) = [line for line in problems(text, b='model.path = "m/m"') if "TOML" in line]
    assert told.startswith("a.toml: cannot read it as TOML: ")
