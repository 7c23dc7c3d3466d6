"""Writes what is installed below share/ beside the programs: manual, completion for shells, JSON schema of the config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import click

import mgpu_llm
from mgpu_llm import __main__ as mgpud
from mgpu_llm.config.json_schema import json_schema
from mgpu_llm.ctl import main as mgpuctl
from mgpu_llm.share import commands, completion, settings
from mgpu_llm.share import unit as units
from mgpu_llm.share.roff import Page

#: Pages of others that who reads ours may want.
ELSEWHERE: Final = ("systemd.service(5)", "systemctl(1)", "journalctl(1)")
PROGRAMS: Final = {"mgpuctl": mgpuctl.cli, "mgpud": mgpud.main}


def pages(unit: str) -> Iterator[tuple[str, Page]]:
    """The manual, by page; `unit` is the text of the unit's file."""
    version = mgpu_llm.__version__
    yield "mgpuctl.1", commands.page("mgpuctl", 1, mgpuctl.cli, version)
    yield "mgpud.8", commands.page("mgpud", 8, mgpud.main, version)
    yield "mgpu-llm.toml.5", settings.page(version)
    yield "mgpu-llm.service.8", units.page(unit, version)


def manual(unit: str) -> Iterator[tuple[str, str]]:
    """Places below share/, and the pages that belong there; each names the others."""
    made = dict(pages(unit))
    names = [re.sub(r"\.(\d)$", r"(\1)", name) for name in made]
    for (name, page), own in zip(made.items(), names, strict=True):
        page.section("SEE ALSO")
        page.text(", ".join(f"`{other}`" for other in [*names, *ELSEWHERE] if other != own))
        yield f"man/man{name[-1]}/{name}", str(page)
    yield "man/man8/mgpu-llm@.service.8", ".so man8/mgpu-llm.service.8\n"


def files(unit: str) -> Iterator[tuple[str, str]]:
    """Places below share/, and what belongs there."""
    yield from manual(unit)
    yield from completion.scripts(PROGRAMS)
    yield "mgpu-llm/mgpu-llm.schema.json", json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


@click.command()
@click.argument("unit", type=click.File(encoding="utf-8"))
@click.argument("folder", type=click.Path(path_type=Path))
def main(unit: IO[str], folder: Path) -> None:
    """Write it into FOLDER. UNIT is the file of mgpu-llm.service, as it is installed."""
    for place, text in files(unit.read()):
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
