"""mgpuctl forget: what was learnt about the settings is no longer believed."""

from __future__ import annotations

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.words import plain, say


@click.command("forget", short_help="Begin the next start with your own settings.")
@click.pass_obj
def command(client: Client) -> int:
    """Begin the next start with your own settings, not with the rung that served last.

    The daemon remembers which rung served when your own settings did not, and begins there. Once the cause is removed:

    \b
    mgpuctl forget && mgpuctl restart
    """
    say(plain(client.forget()))
    return exits.DONE
