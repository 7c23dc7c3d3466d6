"""mgpuctl incidents: what is kept of failed attempts."""

from __future__ import annotations

import json

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.evidence import incidents_lines
from mgpu_llm.ctl.words import page, say


@click.command("incidents")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, *, as_json: bool) -> int:
    """The failed attempts of which evidence is kept, oldest first."""
    incidents = client.incidents()
    with client.making_sense():
        text = (
            json.dumps({"incidents": incidents}, indent=2) if as_json else "\n".join(incidents_lines(incidents, page()))
        )
    say(text)
    return exits.DONE
