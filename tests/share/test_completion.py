"""Completion in a shell: the scripts that are installed, and what the programs answer to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PurePath

import click
import pytest

from mgpu_llm.core import instances
from mgpu_llm.ctl.main import cli
from mgpu_llm.share.__main__ import PROGRAMS
from mgpu_llm.share.completion import PLACES, scripts

UNIT = Path(__file__).parents[2] / "packaging/systemd/mgpu-llm.service"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, "-m", "mgpu_llm.share", UNIT, folder], check=True, timeout=60)
    return folder


def completed(program: str, *words: str, **environment: str) -> list[str]:
    """What the program answers where the last of the words is to be completed, as the script for bash asks it."""
    asked = {"COMP_WORDS": "\n".join((program, *words)), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [BIN / program],
        env={**os.environ, **asked, f"_{program.upper()}_COMPLETE": "bash_complete", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.splitlines()]


def test_the_scripts_are_those_that_the_programs_print_themselves(share: Path) -> None:
    for program in PROGRAMS:
        environment = {**os.environ, f"_{program.upper()}_COMPLETE": "bash_source"}
        told = subprocess.run([BIN / program], env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert (share / PLACES["bash"].format(program)).read_text() == told.stdout


@pytest.mark.parametrize("shell", list(PLACES))
def test_each_script_asks_its_program_by_clicks_variable(share: Path, shell: str) -> None:
    for program in PROGRAMS:
        text = (share / PLACES[shell].format(program)).read_text()
        assert f"_{program.upper()}_COMPLETE={shell}_complete" in text
    assert len(list(scripts(PROGRAMS))) == len(PLACES) * len(PROGRAMS)


def test_bash_completes_a_verb_by_the_script(share: Path) -> None:
    script = share / PLACES["bash"].format("mgpuctl")
    line = (
        f"source {script}; COMP_WORDS=(mgpuctl st); COMP_CWORD=1; _mgpuctl_completion mgpuctl; echo ${{COMPREPLY[@]}}"
    )
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], env={"PATH": path}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "status start stop\n"


def test_verbs_of_verbs_and_options_are_completed() -> None:
    assert completed("mgpuctl", "config", "s") == ["schema", "show"]
    assert "--watch" in completed("mgpuctl", "status", "--")
    assert completed("mgpud", "--sch") == ["--schema"]


def test_causes_are_completed() -> None:
    found = completed("mgpuctl", "plan", "--cause", "stalled-in-d")
    assert found == ["stalled-in-distributed-init"]


def test_names_of_instances_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "CONFIGS", PurePath(tmp_path))
    for name in ("big", "bar", "small", instances.USUAL):
        (tmp_path / f"{name}.toml").touch()
    (option,) = [param for param in cli.params if param.name == "instance"]
    with click.Context(cli) as context:
        assert [item.value for item in option.shell_complete(context, "b")] == ["bar", "big"]
        assert [item.value for item in option.shell_complete(context, "")] == ["bar", "big", "small"]
