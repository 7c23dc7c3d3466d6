"""mgpuctl reload."""

from __future__ import annotations

import json

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.words import plain, say


@click.command("reload", short_help="Let a changed config hold, as far as it can without a restart.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, *, as_json: bool) -> int:
    """Have the daemon read its config again: what systemctl reload does.

    Patience, [heartbeat], [serving], [retries], stop.grace, the log level and what the ladder may change hold at once. What
    else has changed is named: it takes a restart of the daemon, which `mgpuctl restart` is not. A config with problems changes
    nothing: they are listed, and the exit status is 8.
    """
    try:
        done = client.reload()
    except Failure as failure:
        if not failure.problems:
            raise
        for problem in failure.problems:
            click.echo(plain(problem), err=True)
        raise Failure("cannot reload: the config is wrong; nothing has changed", exits.REFUSED) from failure
    if as_json:
        say(json.dumps(done, indent=2))
        return exits.DONE
    with client.making_sense():
        applied, waiting = (", ".join(map(str, done[what])) for what in ("applied", "needs_restart"))
    lines = [f"applied: {applied}"] if applied else []
    lines += [f"needs a restart: {waiting}; do it with: systemctl restart {client.unit}"] if waiting else []
    for line in lines or ["nothing to do: the config is as it was"]:
        say(plain(line))
    return exits.DONE
