"""mgpuctl config: what the config comes to, and how it may look. mgpud tells both; no daemon is needed."""

from __future__ import annotations

import json

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.config_page import config_lines
from mgpu_llm.ctl.mgpud import Question
from mgpu_llm.ctl.words import plain, say

#: mgpud's exit status where the config has problems; it prints its document all the same.
PROBLEMS = 78


@click.group("config", short_help="The config: its values and where each is from, or its schema for editors.")
def command() -> None:
    """The config: its values and where each is from, or its schema for editors."""


@command.command("show")
@click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    help="The config to show, instead of the usual one or the instance's.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def show(client: Client, config: str | None, *, as_json: bool) -> int:
    """Every setting and who said it: a file, mgpu-llm itself ("default"), or the name of the instance. Secrets are "...".

    It is TOML, of the files as they are now: a daemon that runs may have begun with others. What is wrong is told on stderr, and
    shown at its default. Variables that systemd hands over as credentials are known to the daemon alone.

    \b
    Exit status: 0; 8 where the files have problems. `mgpud --check` looks at GPUs, model and engine too.
    """
    question = Question(
        words=("--show-config", *(("--config", config) if config else client.config)), doing="show the config"
    )
    done = question.run()
    document = question.document(done, (0, PROBLEMS))
    try:
        lines = config_lines(document)
        problems = [plain(str(problem)) for problem in document["problems"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Failure(
            "cannot show the config: mgpud --show-config printed another document", exits.NO_ANSWER
        ) from error
    say(json.dumps(document, indent=2) if as_json else "\n".join(lines))
    for problem in problems:
        click.echo(problem, err=True)
    return exits.REFUSED if problems else exits.DONE


@command.command("schema")
def schema() -> int:
    """The JSON schema (draft 2020-12) of the config, with descriptions, defaults and bounds.

    Editors complete by it: taplo and those that use it (Even Better TOML) where the first line of the config is
    `#:schema FILE`, with the file that this was written to.
    """
    question = Question(words=("--schema",), doing="tell the schema")
    say(json.dumps(question.document(question.run()), indent=2, ensure_ascii=False))
    return exits.DONE
