from __future__ import annotations

import pytest

from mgpu_llm.config.endpoint import endpoint, listening
from tests.config.loading import config


@pytest.mark.parametrize(
    ("engine", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("host = '0.0.0.0'\nport = 81", "http://127.0.0.1:81"),
        ("host = ''", "http://127.0.0.1:8000"),
        ("host = '::'", "http://[::1]:8000"),
        ("host = 'fe80::1%eth0'", "http://[fe80::1%25eth0]:8000"),
        ("host = 'node7'", "http://node7:8000"),
        ("host = 'node7'\nargs = ['--host', '10.0.0.1', '--port=81']", "http://10.0.0.1:81"),
        ("args = ['--port', 'x']", "http://127.0.0.1:8000"),
        ("args = ['--host=']\nhost = 'node7'", "http://127.0.0.1:8000"),
        ("args = ['--ssl-keyfile', 'k', '--ssl-certfile', 'c']", "https://127.0.0.1:8000"),
        ("args = ['--ssl_certfile=c']", "https://127.0.0.1:8000"),
        ("args = ['--root-path', '/behind']", "http://127.0.0.1:8000"),
    ],
)
def test_probes_go_where_the_engine_listens(engine: str, url: str) -> None:
    found = endpoint(config(f"[engine]\n{engine}"), {})
    assert (found.url, found.uds) == (url, None)


def test_a_unix_socket_weighs_more_than_host_and_port() -> None:
    found = endpoint(config("engine.args = ['--uds', '/run/v.sock', '--port', '81']"), {})
    assert (found.url, found.uds) == ("http://localhost", "/run/v.sock")
    assert listening(config("engine.args = ['--uds=']")).uds is None


@pytest.mark.parametrize(
    ("engine", "environ", "key"),
    [
        ("", {}, None),
        ("", {"VLLM_API_KEY": "inherited"}, "inherited"),
        ("env = { VLLM_API_KEY = 'own' }", {"VLLM_API_KEY": "inherited"}, "own"),
        ("env = { VLLM_API_KEY = '' }", {"VLLM_API_KEY": "inherited"}, None),
        ("args = ['--api-key', 'sk-1', 'two']", {"VLLM_API_KEY": "inherited"}, "sk-1"),
        ("args = ['--api_key=sk-1']", {}, "sk-1"),
        ("args = ['--api-key', '', 'two']", {}, "two"),
        ("args = ['--api-key', '']", {"VLLM_API_KEY": "inherited"}, None),
    ],
)
def test_the_api_key_is_the_one_that_the_engine_asks_for(engine: str, environ: dict[str, str], key: str | None) -> None:
    found = endpoint(config(f"[engine]\n{engine}"), environ)
    assert found.api_key == key
    assert key is None or key not in repr(found)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", None),
        ("model.served_name = 'm'", "m"),
        ("engine.args = ['--served-model-name', 'a', 'b']", "a"),
        ("engine.args = ['--served-model-name=a']", "a"),
    ],
)
def test_the_served_name_is_the_first_that_the_engine_answers_to(text: str, name: str | None) -> None:
    assert endpoint(config(text), {}).served_name == name
