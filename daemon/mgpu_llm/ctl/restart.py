"""mgpuctl restart."""

from __future__ import annotations

import click

from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.request import carry_out


@click.command("restart")
@click.option("--wait", is_flag=True, help="Return when the model is served again, or when that has failed.")
@click.pass_obj
def command(client: Client, *, wait: bool) -> int:
    """End the engine and start it anew, on the rung that served last."""
    return carry_out(client, "restart", wait=wait)
