"""mgpuctl status: what the daemon is doing, in one page, one document, or live."""

from __future__ import annotations

import json

import click

from mgpu_llm.control_api import status_from_json
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.layout import status_lines
from mgpu_llm.ctl.words import page, say


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--watch", is_flag=True, help="Go on showing it, twice a second, until Ctrl-C.")
@click.pass_obj
def command(client: Client, *, as_json: bool, watch: bool) -> int:
    """What the daemon does; exits with 0 only if it serves."""
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other: --json is always one whole document")
    if watch:
        from mgpu_llm.ctl.watch import watch_status  # rich takes longer to import than the whole of a plain status

        return watch_status(client)
    document = client.status_document()
    with client.making_sense():
        status = status_from_json(document)
        text = json.dumps(document, indent=2) if as_json else "\n".join(status_lines(status, page()))
    say(text)
    return exits.of_state(status.state)
