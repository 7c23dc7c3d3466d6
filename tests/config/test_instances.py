"""The config of one of several instances: /etc/mgpu-llm/NAME.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config import effective, parse
from mgpu_llm.core import instances


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /etc/mgpu-llm."""
    monkeypatch.setattr(instances, "CONFIGS", tmp_path)
    (tmp_path / "big.toml").write_text('[model]\npath = "/srv/big"\n')
    return tmp_path


def test_its_folders_have_its_name(folder: Path) -> None:
    daemon = parse.load(folder / "big.toml").config.daemon
    assert (daemon.runtime_dir, daemon.state_dir) == ("/run/mgpu-llm@big", "/var/lib/mgpu-llm@big")
    assert parse.load(folder / "mgpu-llm.toml").config.daemon.runtime_dir == "/run/mgpu-llm"


def test_it_is_known_by_a_relative_path_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for path in ("big.toml", f"../{folder.name}/big.toml", "./conf.d/../big.toml"):
        assert parse.load(Path(path)).config.daemon.runtime_dir == "/run/mgpu-llm@big"
        assert effective.document(Path(path))["instance"] == "big"


def test_what_its_file_says_of_its_folders_counts(folder: Path) -> None:
    with (folder / "big.toml").open("a") as file:
        file.write('[daemon]\nstate_dir = "/srv/state"\n')
    daemon = parse.load(folder / "big.toml").config.daemon
    assert (daemon.runtime_dir, daemon.state_dir) == ("/run/mgpu-llm@big", "/srv/state")


def test_its_drop_ins_are_its_own_and_those_of_the_usual_one_do_not_change_it(folder: Path) -> None:
    for name, port in (("conf.d", 1111), ("big.d", 2222), ("small.d", 3333)):
        (folder / name).mkdir()
        (folder / name / "port.toml").write_text(f"[engine]\nport = {port}\n")
    (folder / "mgpu-llm.toml").write_text('[model]\npath = "/srv/usual"\n')
    assert parse.load(folder / "big.toml").config.engine.port == 2222
    assert parse.load(folder / "mgpu-llm.toml").config.engine.port == 1111


def test_a_problem_with_a_folder_that_its_name_gave_is_under_its_file(folder: Path) -> None:
    name = "x" * 64
    (folder / f"{name}.toml").write_text('[model]\npath = "/srv/big"\n[daemon]\nstate_dir = 7\n')
    (problem,) = parse.load(folder / f"{name}.toml").problems
    assert (problem.file, problem.key) == (folder / f"{name}.toml", "daemon.state_dir")
