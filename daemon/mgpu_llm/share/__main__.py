"""Writes what is installed below share/ beside the programs: completion for shells and the JSON schema of the config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from mgpu_llm import __main__ as mgpud
from mgpu_llm.config.json_schema import json_schema
from mgpu_llm.ctl import main as mgpuctl
from mgpu_llm.share import completion

PROGRAMS = {"mgpuctl": mgpuctl.cli, "mgpud": mgpud.main}


def files() -> Iterator[tuple[str, str]]:
    """Places below share/, and what belongs there."""
    yield from completion.scripts(PROGRAMS)
    yield "mgpu-llm/mgpu-llm.schema.json", json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write it into FOLDER."""
    for place, text in files():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
