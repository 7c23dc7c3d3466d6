"""Secrets that systemd hands over become variables of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config import credentials, parse
from mgpu_llm.config.problem import render


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of credentials of this process."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv(credentials.FOLDER, str(folder))
    return folder


def load(tmp_path: Path, text: str = "") -> parse.Loaded:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text(f'[model]\npath = "/srv/big"\n{text}')
    return parse.load(main)


def test_each_is_a_variable_and_counts_more_than_the_files(tmp_path: Path, given: Path) -> None:
    (given / "env.HF_TOKEN").write_text("hf_1\n")
    (given / "env.VLLM_API_KEY").write_text('quotes " and \\ and\nlines')
    (given / "tls-key").write_text("of somebody else")
    loaded = load(tmp_path, '[engine.env]\nHF_TOKEN = "old"\nA = "1"\n')
    assert loaded.problems == ()
    assert loaded.config.engine.env == {"A": "1", "HF_TOKEN": "hf_1", "VLLM_API_KEY": 'quotes " and \\ and\nlines'}


def test_without_any_the_files_say_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(credentials.FOLDER, raising=False)
    assert load(tmp_path).config.engine.env == {}


def test_what_is_no_secret_by_its_name_is_refused_and_not_shown(tmp_path: Path, given: Path) -> None:
    (given / "env.NCCL_DEBUG").write_text("sesame")
    loaded = load(tmp_path)
    assert not loaded.complete
    told = render(loaded.problems)
    assert told == (
        f"{given}/env.NCCL_DEBUG: a credential for the variable 'NCCL_DEBUG', which is no secret by its name; "
        "write it into [engine.env]"
    )


def test_what_cannot_be_a_variable_is_a_problem_without_its_value(tmp_path: Path, given: Path) -> None:
    (given / "env.HF_TOKEN").write_bytes(b"\xff\xfe")
    (given / "env.MY-TOKEN").write_text("sesame")
    (given / "env.NUL_TOKEN").write_bytes(b"ses\0ame")
    told = render(load(tmp_path).problems)
    assert "env.HF_TOKEN: it is not UTF-8; variables are text" in told
    assert len(told.splitlines()) == 3
    assert "ses" not in told


def test_one_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, given: Path) -> None:
    (given / "env.HF_TOKEN").mkdir()
    assert render(load(tmp_path).problems) == f"{given}/env.HF_TOKEN: cannot read it: is a directory"
