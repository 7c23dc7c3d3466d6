"""The manual: that man(1) can show it, and that nothing of programs, config and unit is missing in it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mgpu_llm.config.schema import tables
from mgpu_llm.share.__main__ import PROGRAMS, manual, pages
from mgpu_llm.share.roff import Page

UNIT = Path(__file__).parents[2] / "packaging/systemd/mgpu-llm.service"


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    for place, text in manual(UNIT.read_text()):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    return folder


def shown(folder: Path, place: str) -> str:
    """The page as groff sets it for a terminal of endless width, with one blank between words."""
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=2000n", place],
        cwd=folder / "man",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def options(command: click.Command, name: str) -> Iterator[str]:
    """Every option of a program and of all its verbs."""
    context = click.Context(command, info_name=name)
    for parameter in command.get_params(context):
        yield from parameter.opts if isinstance(parameter, click.Option) else ()
    if isinstance(command, click.Group):
        for verb in command.list_commands(context):
            below = command.get_command(context, verb)
            assert below is not None
            yield from options(below, verb)


def test_groff_has_no_remark_on_any_page(share: Path) -> None:
    places = [place.removeprefix("man/") for place, _ in manual(UNIT.read_text())]
    assert len(places) == 5
    for place in places:
        assert shown(share, place).startswith(("mgpu", "MGPU")), place


@pytest.mark.parametrize(("program", "place"), [("mgpuctl", "man1/mgpuctl.1"), ("mgpud", "man8/mgpud.8")])
def test_every_option_and_verb_of_a_program_is_in_its_page(share: Path, program: str, place: str) -> None:
    text, command = shown(share, place), PROGRAMS[program]
    assert [option for option in options(command, program) if option not in text] == []
    verbs = command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []
    assert [verb for verb in verbs if f"mgpuctl {verb} [OPTIONS]" not in text] == []


def test_each_exit_status_has_its_line(share: Path) -> None:
    for status in (65, 69, 70, 75, 78):
        assert re.search(rf"^\.TP\n\\fB{status}\\fR\n\w", (share / "man/man8/mgpud.8").read_text(), re.MULTILINE)
    for status in range(9):
        assert re.search(rf"^\.TP\n\\fB{status}\\fR\n\w", (share / "man/man1/mgpuctl.1").read_text(), re.MULTILINE)


def test_every_table_and_key_of_the_config_is_in_its_page_with_the_default(share: Path) -> None:
    text = shown(share, "man5/mgpu-llm.toml.5")
    for name, table in tables().items():
        assert f"[{name}]" in text
        for key in table.model_fields:
            assert re.search(rf"\b{key} (= \S.* )?\(", text), key
    assert "port = 8000 (an integer from 1 to 65535)" in text
    assert 'use = "all" ("all", "none", a list of indices or of UUIDs)' in text


def test_every_line_of_the_unit_is_in_its_page_with_its_comment(share: Path) -> None:
    text = shown(share, "man8/mgpu-llm.service.8")
    settings = [line for line in UNIT.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in settings if line not in text] == []
    assert "READY=1 follows a completion. Type=notify NotifyAccess=main ExecStart=/usr/local/bin/mgpud" in text
    assert shown(share, "man8/mgpu-llm@.service.8") == text


def test_what_roff_would_take_for_a_request_or_an_escape_is_shown_as_it_is(tmp_path: Path) -> None:
    words = [".nf", "'quoted'", "\\fBback\\slash", '"double"', "--an-option", "~/^`", "größer"]
    page = Page("mgpu", 1, "0", "a page")
    page.as_it_is(words)
    page.entry(["- head", ".TP"], "".join(f"{word}\n\n" for word in words if "`" not in word))
    for word in words:
        page.text(word)
    (tmp_path / "man").mkdir()
    (tmp_path / "man/page").write_text(str(page))
    text = shown(tmp_path, "page")
    assert [text.count(word) for word in words] == [3, 3, 3, 3, 3, 2, 3]


def test_each_page_names_the_others() -> None:
    made = dict(manual("[Unit]\n"))
    for name, _ in pages("[Unit]\n"):
        others = [other for other, _ in pages("[Unit]\n") if other != name]
        text = made[f"man/man{name[-1]}/{name}"].replace("\\-", "-")
        see_also = text[text.index('.SH "SEE ALSO"') :]
        assert [other for other in others if f"{other[:-2]}({other[-1]})" not in see_also] == []
