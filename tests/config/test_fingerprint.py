"""Whether it is still the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mgpu_llm.config.model import ModelFingerprint, fingerprint
from tests.config.loading import config, unprivileged

SETTINGS = b'{"model_type": "llama"}'
DIGEST = hashlib.sha256(SETTINGS).hexdigest()


def model(folder: Path, *, settings: bytes = SETTINGS, name: str = "config.json", weights: bytes = b"12345") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(settings)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def of(path: Path | str, args: str = "[]") -> ModelFingerprint:
    return fingerprint(config(f"model.path = '{path}'\nengine.args = {args}"), {"HOME": "/nowhere"})


def test_it_is_the_path_the_size_of_the_weights_and_the_digest_of_the_settings(tmp_path: Path) -> None:
    assert of(model(tmp_path)) == ModelFingerprint(path=str(tmp_path), bytes=5, config_sha256=DIGEST)


def test_it_stays_while_nothing_changes_and_can_be_a_key(tmp_path: Path) -> None:
    assert of(model(tmp_path)) == of(tmp_path)
    assert len({of(tmp_path), of(tmp_path)}) == 1


def test_another_path_other_weights_and_other_settings_are_another_model(tmp_path: Path) -> None:
    before = of(model(tmp_path / "a"))
    assert of(model(tmp_path / "b")) != before
    assert of(model(tmp_path / "a", weights=b"123456")) != before
    model(tmp_path / "a")
    assert of(tmp_path / "a") == before
    assert of(model(tmp_path / "a", settings=SETTINGS + b"\n")) != before


def test_a_path_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = of(tmp_path / "org" / "name")
    assert [of(path) for path in ("org/name", "./org/name", "~/org/name")] == [whole] * 3


def test_mistrals_own_settings_count_only_where_there_is_no_config_json(tmp_path: Path) -> None:
    model(tmp_path, name="params.json", settings=b"{}")
    assert of(tmp_path).config_sha256 == hashlib.sha256(b"{}").hexdigest()
    assert of(model(tmp_path)).config_sha256 == DIGEST


def test_settings_need_not_be_json_to_be_told_apart(tmp_path: Path) -> None:
    assert of(model(tmp_path, settings=b"\xff{")).config_sha256 == hashlib.sha256(b"\xff{").hexdigest()


def test_weights_that_are_not_read_have_no_size(tmp_path: Path) -> None:
    found = of(model(tmp_path), '["--load-format", "dummy"]')
    assert found == ModelFingerprint(path=str(tmp_path), bytes=None, config_sha256=DIGEST)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "org/name", "s3://bucket/model", ""])
def test_of_a_model_that_is_not_on_this_host_only_the_path_is_known(path: str) -> None:
    assert of(path) == ModelFingerprint(path=path, bytes=None, config_sha256="")


def test_a_file_and_a_folder_without_settings_have_no_digest(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"1234")
    assert of(tmp_path / "model.gguf").config_sha256 == ""
    assert of(tmp_path) == ModelFingerprint(path=str(tmp_path), bytes=4, config_sha256="")


def test_of_a_folder_that_may_not_be_searched_only_the_path_is_known(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    folder.chmod(0o700)
    with unprivileged():
        assert of(folder) == ModelFingerprint(path=str(folder), bytes=None, config_sha256="")


def test_a_hub_model_keeps_its_id_and_is_read_in_the_local_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    hub, known = "model.path = 'org/name'", ModelFingerprint(path="org/name", bytes=5, config_sha256=DIGEST)
    assert fingerprint(config(hub), {"HF_HUB_CACHE": str(tmp_path)}) == known
    assert fingerprint(config(f"{hub}\nengine.env.HF_HUB_CACHE = '{tmp_path}'"), {}) == known
