"""mgpuctl ladder: the rungs in the order in which they would be tried against an unknown cause, with the changes of each."""

from __future__ import annotations

import json

import click

from mgpu_llm.control_api import rung_to_json
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.layout import ladder_lines
from mgpu_llm.ctl.words import page, say


@click.command("ladder", short_help="The rungs for causes that nobody knows, in order.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, *, as_json: bool) -> int:
    """The rungs for causes that nobody knows, in order, with their changes and costs.

    Where each stands: tried in vain, passed over because a later one served last, current, next, later. Against a cause that
    is known other rungs may be tried, in another order: mgpuctl plan --cause CAUSE.
    """
    rungs = client.rungs()
    with client.making_sense():
        document = {"rungs": [rung_to_json(rung) for rung in rungs]}
        text = json.dumps(document, indent=2) if as_json else "\n".join(ladder_lines(rungs, page()))
    say(text)
    return exits.DONE
