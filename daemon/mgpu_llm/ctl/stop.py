"""mgpuctl stop."""

from __future__ import annotations

import click

from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.request import carry_out


@click.command("stop")
@click.option("--wait", is_flag=True, help="Return when no process of the engine is left.")
@click.pass_obj
def command(client: Client, *, wait: bool) -> int:
    """End the engine; the daemon itself goes on."""
    return carry_out(client, "stop", wait=wait)
