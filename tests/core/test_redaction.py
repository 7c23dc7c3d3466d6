"""Whatever is kept of a failed attempt holds no token, key or password, and as much as possible of everything else."""

from __future__ import annotations

import json
import time
from urllib.parse import quote

import pytest

from mgpu_llm.core import redaction
from mgpu_llm.core.redaction import Redactor, secrets_of
from tests.support import recordings

ANY = Redactor()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("using hf_AbCdEfGhIjKlMnOp", "using hf_..."),
        ("OpenAI sk-proj-0123456789abcdef_x, done", "OpenAI sk-..., done"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: ..."),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: ..."),
        ("{'Authorization': 'Bearer abcdefghij'}", "{'Authorization': '...'}"),
        ('"authorization", "Token x"', '"authorization", "..."'),
        ("sent as bearer abcdefgh12", "sent as bearer ..."),
        ("Basic dXNlcjpwYXNz", "Basic ..."),
        ("http://user:pass@proxy:3128/x?y=1", "http://...@proxy:3128/x?y=1"),
        ("https://ghp_123456@github.com/a", "https://...@github.com/a"),
        ("--api-key sk-1 --port 8000", "--api-key ... --port 8000"),
        ("--api-key=topsecret --port 8000", "--api-key=... --port 8000"),
        ("['--hf-token', 'topsecret', '--port']", "['--hf-token', '...', '--port']"),
        ("HF_TOKEN=topsecret vllm serve", "HF_TOKEN=... vllm serve"),
        ("non-default args: {'api_key': ['a1', 'b2'], 'port': 1}", "non-default args: {'api_key': ..., 'port': 1}"),
        ("{'hf_token': 'topsecret', 'port': 1}", "{'hf_token': ..., 'port': 1}"),
        ('{\\"api_key\\": \\"topsecret\\", \\"port\\": 1}', '{\\"api_key\\": ..., \\"port\\": 1}'),
        ("password: topsecret", "password: ..."),
        ("GET /x?a=1&access_token=topsecret&b=2", "GET /x?a=1&access_token=...&b=2"),
        ("GET /x?X-Amz-Signature=topsecret&b=2", "GET /x?X-Amz-Signature=...&b=2"),
        ("AKIAIOSFODNN7EXAMPLE", "AKIA..."),
        ("ASIAIOSFODNN7EXAMPLE", "ASIA..."),
        ("AIzaSyD0123456789", "AIza..."),
        ("glpat-0123456789", "glpat-..."),
        ("nvapi-0123456789", "nvapi-..."),
        ("xoxb-0123456789", "xoxb-..."),
        ("github_pat_0123456789", "github_pat_..."),
        *((f"gh{kind}_0123456789", f"gh{kind}_...") for kind in "pousr"),
        ("MY_SECRET = x", "MY_SECRET = ..."),
        ("aws_secret_access_key: x", "aws_secret_access_key: ..."),
        ("ApiKey='x'", "ApiKey=..."),
        ("passphrase=x passwd=y", "passphrase=... passwd=..."),
        ("db_credentials: x", "db_credentials: ..."),
        ("ssl_private_key=x", "ssl_private_key=..."),
        ("--hf-token  x", "--hf-token  ..."),
        ('["--token", "x"]', '["--token", "..."]'),
        (f"api_key=['{'k' * 9000}', 'b'], port=1", "api_key=..., port=1"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.abc", "eyJ..."),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_nothing_beside_it(text: str, told: str) -> None:
    assert ANY.text(text) == ANY.line(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "Loading safetensors checkpoint shards:  38% Completed | 3/8 [00:01<00:02]",
        "max_num_batched_tokens=8192, tokenizer='/models/m', tokenizer_mode=auto, TOKENIZERS_PARALLELISM=false",
        "GPU KV cache size: 1,234 tokens, Maximum concurrency for 4,096 tokens per request: 3.2x",
        "hf_overrides={}, hf_transfer, hf_quantizer, sk-learn, task-runner-of-the-host, disk-0123456789",
        "distributed_init_method=tcp://127.0.0.1:55337 backend=nccl",
        "bearer of bad news: basic training of the model",
        "usage: vllm serve [--api-key API_KEY [API_KEY ...]] [--lora-modules LORA]".replace("API_KEY [", "... ["),
        "nothing at all",
        "",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert ANY.text(text) == ANY.line(text) == text


def test_values_of_secret_variables_and_options_and_passwords_in_urls_are_known() -> None:
    found = secrets_of(
        {
            "HF_TOKEN": "the hub's token",
            "PGPASSWD": "a b\ncdefgh\nijklmn",
            "https_proxy": "http://me:p@ss/word@proxy:1",
            "SOME_TOKEN": "true",
            "PATH": "/usr/bin:/bin",
        },
        ["vllm", "serve", "--api-key", "first-key", "second-key", "--port", "8000", "--hf-token=inline-token"],
    )
    assert found == {
        "the hub's token",
        "a b\ncdefgh\nijklmn",
        "cdefgh",
        "ijklmn",
        "me:p@ss/word",
        "p@ss/word",
        "first-key",
        "second-key",
        "inline-token",
    }


def test_a_known_secret_is_hidden_in_every_form_in_which_it_may_be_printed() -> None:
    secret = 'it\'s "a" b/ü\\secret'
    redactor = Redactor([secret, secret + " and more"])
    for form in (secret, repr(secret), json.dumps(secret), quote(secret), quote(secret, safe="")):
        told = redactor.text(f"before {form} after")
        assert "secret" not in told
        assert told.startswith("before ")
        assert told.endswith(" after")
        assert redactor.line(f"before {form} after") == told
    assert redactor.text(f"{secret} and more") == "..."
    assert [Redactor(["key of mine"]).line(text) for text in ("the key of mine", "nothing of it")] == [
        "the ...",
        "nothing of it",
    ]


@pytest.mark.parametrize("name", recordings.names())
def test_what_engines_have_really_said_stays_as_it_was(name: str) -> None:
    lines = recordings.load(name).lines
    assert [ANY.line(line) for line in lines] == [ANY.text(line) for line in lines] == list(lines)


def test_documents_lose_secrets_in_texts_and_what_secret_keys_hold() -> None:
    told = Redactor(["plain-secret"]).tree(
        {
            "api_key": "x",
            "token": 7,
            "args": ["plain-secret", 1.5, None, True],
            "plain-secret": ("hf_AbCdEfGhIjKlMnOp",),
        }
    )
    assert told == {"api_key": "...", "token": 7, "args": ["...", 1.5, None, True], "...": ["hf_..."]}


def test_a_command_line_and_an_environment_lose_what_their_names_say_is_secret() -> None:
    words = ["vllm", "--api-key", "a", "b", "--port", "1", "--hf-token=c", "--token="]
    assert redaction.argv(words) == ["vllm", "--api-key", "...", "...", "--port", "1", "--hf-token=...", "--token="]
    assert redaction.environment({"VLLM_API_KEY": "a", "HOME": "/root", "DB_CREDENTIALS": "b"}) == {
        "DB_CREDENTIALS": "...",
        "HOME": "/root",
        "VLLM_API_KEY": "...",
    }


@pytest.mark.parametrize(
    "unit", ["a", "-", "_", "token", "://", "://a@", "api_key=[", "'", "eyJ", "Bearer ", " ", "--x-"]
)
def test_the_time_it_takes_grows_with_the_text_and_no_faster(unit: str) -> None:
    text = (unit * (1 << 20))[: 1 << 20]
    begun = time.process_time()
    ANY.text(text)
    # A pattern that is quadratic in a word would take hours here.
    assert time.process_time() - begun < 60
