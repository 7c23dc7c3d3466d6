"""mgpuctl plan: what would be tried against a cause. The daemon tells it, or mgpud makes it from a config."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click
from click.shell_completion import CompletionItem

from mgpu_llm.control_api import UNKNOWN_CAUSE
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.mgpud import Question
from mgpu_llm.ctl.plan_page import plan_lines
from mgpu_llm.ctl.words import page, plain, say


@click.command("plan", short_help="What would be tried against a cause, and what would not.")
@click.option(
    "--cause",
    default=UNKNOWN_CAUSE,
    show_default=True,
    metavar="CAUSE",
    shell_complete=lambda _, __, begun: [CompletionItem(cause) for cause in _causes() if cause.startswith(begun)],
    help="As `mgpuctl attempts` tells it.",
)
@click.option(
    "--config", type=click.Path(), metavar="FILE", help="Plan for this config, whatever the daemon runs with."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, cause: str, config: str | None, *, as_json: bool) -> int:
    """What would be tried against a cause, in which order, and what would not and why.

    It is the plan of the daemon that runs. Where none does, or with --config, mgpud makes it from the config; that starts
    nothing, and needs no vLLM, and no driver where the config names the GPUs.
    """
    document = _of_daemon(client, cause) if config is None else _of_config(cause, "--config", config)
    with client.making_sense():
        text = json.dumps(document, indent=2) if as_json else "\n".join(plan_lines(document, page()))
    say(text)
    return exits.DONE


def _of_daemon(client: Client, cause: str) -> dict[str, Any]:
    try:
        return client.plan(cause)
    except Failure as failure:
        if failure.code == exits.WRONG_COMMAND:
            raise _unknown(cause) from failure
        if failure.code != exits.NO_DAEMON:
            raise
    click.echo(f"mgpuctl: no daemon answers on {plain(client.path)}; this is what mgpud makes of its config", err=True)
    return _of_config(cause, *client.config)


def _of_config(cause: str, *more: str) -> dict[str, Any]:
    question = Question(words=("--plan", cause, *more), doing="plan")
    made = question.run()
    if made.returncode == exits.WRONG_COMMAND and cause not in _causes():
        raise _unknown(cause)
    return question.document(made)


def _unknown(cause: str) -> click.BadParameter:
    from difflib import get_close_matches  # for a mistake only

    known = _causes()
    close = get_close_matches(cause, known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    listed = textwrap.fill(f"There are: {', '.join(known)}", 100, subsequent_indent="  ", break_on_hyphens=False)
    return click.BadParameter(f"there is no cause {cause!r}{hint}\n{listed}", param_hint="'--cause'")


def _causes() -> tuple[str, ...]:
    from mgpu_llm.core import planning  # with the whole table of causes, for which nobody else here has to wait

    return (*planning.causes(), UNKNOWN_CAUSE)
