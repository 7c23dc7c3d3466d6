"""mgpuctl incident: one failed attempt, to read or to attach to a report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from mgpu_llm.core.incident import ID
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.evidence import incident_lines
from mgpu_llm.ctl.words import page, plain, say


@click.group("incident", short_help="One failed attempt: show it, or export it for a report.")
def command() -> None:
    """One failed attempt, by its ID as `mgpuctl incidents` lists it; the beginning of one is enough, "last" is the newest."""


@command.command("show")
@click.argument("wanted", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def show(client: Client, wanted: str, *, as_json: bool) -> int:
    """What failed, why, what was done, and what is kept."""
    document = client.incident(wanted)
    with client.making_sense():
        text = json.dumps(document, indent=2) if as_json else "\n".join(incident_lines(document, page()))
    say(text)
    return exits.DONE


@command.command("export")
@click.argument("wanted", metavar="ID")
@click.argument("file", metavar="[FILE]", default="")
@click.pass_obj
def export(client: Client, wanted: str, file: str) -> int:
    """Write all of it into one .tar.gz, to attach to a bug report. Secrets have been taken out.

    FILE is ID.tar.gz in this folder unless it is given; "-" is standard output.
    """
    with client.making_sense():
        name = str(client.incident(wanted)["id"])
        if not ID.fullmatch(name):  # it becomes the name of a file here
            raise ValueError("no id of an incident")
    packed = client.incident_archive(name)
    if file == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(packed)
        sys.stdout.buffer.flush()
        return exits.DONE
    path = Path(file or ".")
    path = path / f"{name}.tar.gz" if path.is_dir() else path
    _write(path, packed)
    say(plain(str(path)))
    return exits.DONE


def _write(path: Path, content: bytes) -> None:
    """Never over a file that is there; for its owner alone, who decides who else shall read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise Failure(f"cannot write '{path}': {(error.strerror or str(error)).lower()}", exits.REFUSED) from error
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Failure(f"cannot write '{path}': {(error.strerror or str(error)).lower()}", exits.REFUSED) from error
