"""mgpuctl logs: the engine's last lines, from the daemon's memory."""

from __future__ import annotations

import click

from mgpu_llm.control_api import MOST_LINES
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.words import plain, say


@click.command("logs")
@click.option("-n", "--lines", "count", type=click.IntRange(1, MOST_LINES), default=50, show_default=True)
@click.pass_obj
def command(client: Client, *, count: int) -> int:
    """The engine's last lines of output, oldest first."""
    lines = client.engine_lines(count)
    if lines:
        say("\n".join(plain(line) for line in lines))
    else:
        click.echo("mgpuctl: the engine has printed nothing yet", err=True)
    return exits.DONE
