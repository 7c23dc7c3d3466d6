"""mgpuctl import-xinference: a config from the command line of Xinference. Asks no daemon."""

from __future__ import annotations

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Failure
from mgpu_llm.ctl.words import page, plain, say
from mgpu_llm.xinference import document
from mgpu_llm.xinference.importing import imported
from mgpu_llm.xinference.words import NotALaunchError


@click.command(
    "import-xinference",
    short_help="A config from the command line of Xinference.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", metavar="COMMAND", nargs=-1, required=True, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Print the mgpu-llm.toml that does what an `xinference launch` does.

    COMMAND is that command line, in quotes as it stands in a shell, or word by word behind "--". The config goes to standard
    output; what could not be carried over, and why, to standard error. Exits with 2 if COMMAND is no `xinference launch`.

    \b
    mgpuctl import-xinference 'xinference launch -en vllm -n qwen2.5-instruct -s 72 --gpu-idx 2,3'
    """
    try:
        findings = imported(words)
    except NotALaunchError as error:
        raise Failure(f"cannot import the command: {error}", exits.NO_RECORDING) from error
    say(document.toml(findings, ascii_only=not page().unicode))
    for line in document.remarks(findings):
        click.echo(plain(line), err=True)
    return exits.DONE
