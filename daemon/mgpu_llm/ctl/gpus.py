"""mgpuctl gpus: the GPUs of the host, who uses them, and what joins them. The daemon tells it, or mgpud looks by itself."""

from __future__ import annotations

import json
from typing import Any

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.gpus_page import gpu_page
from mgpu_llm.ctl.mgpud import Question
from mgpu_llm.ctl.words import Page, page, plain, say

QUESTION = Question(words=("--gpus",), doing="see the GPUs")


@click.command("gpus", short_help="The GPUs of this host, who uses them, and what joins them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with the driver's reserve and more.")
@click.option("--watch", is_flag=True, help="Go on showing it, each two seconds, until Ctrl-C.")
@click.pass_obj
def command(client: Client, *, as_json: bool, watch: bool) -> int:
    """The GPUs of this host: memory, load, health, who uses them, and what joins them.

    The daemon tells it. Where none runs, mgpud looks by itself; that needs no config, and touches nothing.
    """
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other: --json is always one whole document")
    if watch:
        from mgpu_llm.ctl.gpus_watch import watch_gpus  # with rich, which a single page need not wait for

        return watch_gpus(client)
    document = told_by_daemon(client)
    if document is None:
        click.echo(f"mgpuctl: {plain(remark(client))}", err=True)
        document = QUESTION.document(QUESTION.run())
    with client.making_sense():
        text = json.dumps(document, indent=2) if as_json else "\n".join(gpu_page(document, page()))
    say(text)
    return exits.DONE


def told_by_daemon(client: Client) -> dict[str, Any] | None:
    """None where no daemon runs. Raises Failure."""
    try:
        return client.gpus()
    except Failure as failure:
        if failure.code == exits.NO_DAEMON:
            return None
        raise


def remark(client: Client) -> str:
    return f"no daemon answers on {client.path}; this is what mgpud sees by itself"


def lines_now(client: Client, on: Page) -> list[str]:
    """The page as it is now, the remark below it, for who looks again and again: nothing of it goes to stderr."""
    document, more = told_by_daemon(client), list[str]()
    if document is None:
        made = QUESTION.run()
        if made.returncode != 0 and made.stderr.strip():
            raise Failure(made.stderr.strip().splitlines()[-1], exits.REFUSED)
        made.stderr = ""
        document, more = QUESTION.document(made), on.wrap(remark(client), 0)
    with client.making_sense():
        return [*gpu_page(document, on), *more]
