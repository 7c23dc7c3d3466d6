"""mgpuctl start."""

from __future__ import annotations

import click

from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.request import carry_out


@click.command("start")
@click.option("--wait", is_flag=True, help="Return when the model is served, or when that has failed.")
@click.pass_obj
def command(client: Client, *, wait: bool) -> int:
    """Bring the engine to service."""
    return carry_out(client, "start", wait=wait)
