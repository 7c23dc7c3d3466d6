from __future__ import annotations

import pytest

from mgpu_llm.config import engine_args as options


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ((), None),
        (("--port-range", "1"), None),
        (("--port", "1"), ("1",)),
        (("--port=1",), ("1",)),
        (("--port=1", "--port", "2"), ("2",)),
        (("--port",), ()),
        (("--port", "--host", "h"), ()),
        (("--port", "1", "2", "--host", "h"), ("1", "2")),
        (("--port=",), ("",)),
    ],
)
def test_an_option_is_found_in_all_forms_and_the_last_holds(args: tuple[str, ...], values: tuple[str, ...]) -> None:
    assert options.values(args, options.PORT) == values


def test_underscores_in_a_long_name_count_as_dashes_and_short_names_are_known() -> None:
    assert options.value(("--served_model_name=a_b",), options.SERVED_NAME) == "a_b"
    assert options.number(("-pp", "2"), options.PIPELINE_PARALLEL) == 2
    assert options.number(("-pp=2",), options.PIPELINE_PARALLEL) == 2
    assert options.number(("-tp", "2"), options.PIPELINE_PARALLEL) is None


def test_an_option_alone_has_an_empty_value_and_an_absent_one_none() -> None:
    assert options.value(("--headless",), options.HEADLESS) == ""
    assert options.value((), options.HEADLESS) is None


@pytest.mark.parametrize(("text", "port"), [("1", 1), ("65535", 65535), ("0", None), ("65536", None), ("x", None)])
def test_a_port_is_one_only_within_its_range(text: str, port: int | None) -> None:
    assert options.port(("--port", text)) == port
    assert options.port(()) is None


def test_the_keys_at_the_margin_of_a_yaml_file_are_its_options() -> None:
    text = '# port: 1\nport: 8001\n"api_key" : k\nmodel: org/name\nhf_overrides:\n  host: nested\n- uds: x\n'
    assert options.options_in_yaml(text) == {"--port", "--api-key", "--model", "--hf-overrides"}
