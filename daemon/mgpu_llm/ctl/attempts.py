"""mgpuctl attempts: each run of the engine that the daemon remembers, with its cause and evidence."""

from __future__ import annotations

import json

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.layout import attempts_lines
from mgpu_llm.ctl.words import page, say


@click.command("attempts")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, *, as_json: bool) -> int:
    """Each run of the engine, why it ended, and what to do."""
    if as_json:
        with client.making_sense():
            say(json.dumps({"attempts": client.status_document()["attempts"]}, indent=2))
        return exits.DONE
    attempts = client.status().attempts
    with client.making_sense():
        lines = attempts_lines(attempts, page())
    say("\n".join(lines))
    return exits.DONE
