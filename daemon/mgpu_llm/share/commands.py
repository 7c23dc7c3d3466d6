"""The pages of mgpud and mgpuctl: what `--help` says, of all verbs in one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

import click

from mgpu_llm.share.roff import Page

#: click's mark of a paragraph whose line ends stay.
_KEPT = "\b"


def page(program: str, section: int, command: click.Command, version: str) -> Page:
    context = click.Context(command, info_name=program, **command.context_settings)
    made = Page(program, section, version, _first_sentence(command))
    made.section("SYNOPSIS")
    made.as_it_is([_usage(context)])
    made.section("DESCRIPTION")
    description, statuses = _parted(command)
    _told(made, description)
    made.section("OPTIONS")
    _options(made, context, command.get_params(context))
    if isinstance(command, click.Group):
        made.section("VERBS")
        _verbs(made, command, context)
    made.section("EXIT STATUS")
    _entries(made, statuses)
    return made


def _verbs(made: Page, group: click.Group, above: click.Context) -> None:
    for name in group.list_commands(above):
        verb = group.get_command(above, name)
        if verb is None:
            raise LookupError(f"{above.command_path} has no verb {name}")
        context = click.Context(verb, info_name=name, parent=above, **verb.context_settings)
        made.subsection(_usage(context))
        description, statuses = _parted(verb)
        _told(made, description)
        _options(made, context, verb.params)  # and --help, which all have
        if statuses:
            made.text("Exit status:")
            _entries(made, statuses)
        if isinstance(verb, click.Group):
            _verbs(made, verb, context)


def _options(made: Page, context: click.Context, parameters: Iterable[click.Parameter]) -> None:
    for parameter in parameters:
        # What an argument is, the verb's own text says.
        told = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if told is not None:
            made.entry([told[0]], told[1])


def _parted(command: click.Command) -> tuple[list[str], list[str]]:
    """The paragraphs of its help, and the exit statuses in it: "0 done"."""
    description, statuses = list[str](), list[str]()
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(f"{command.help}\n\n{command.epilog or ''}")):
        text = paragraph.removeprefix(f"{_KEPT}\n")
        if listed := re.match(r"Exit codes:\n", text):
            statuses += [line.strip() for line in text[listed.end() :].splitlines()]
        elif listed := re.match(r"Exit status: ", text):
            statuses += " ".join(text[listed.end() :].split()).rstrip(".").split("; ")
        else:
            description.append(paragraph)
    return description, statuses


def _told(made: Page, paragraphs: Iterable[str]) -> None:
    for paragraph in paragraphs:
        if paragraph.startswith(f"{_KEPT}\n"):
            made.as_it_is([line.strip() for line in paragraph.splitlines()[1:]])
        else:
            made.text(" ".join(paragraph.split()))


def _entries(made: Page, statuses: Iterable[str]) -> None:
    for status in statuses:
        number, _, what = status.partition(" ")
        made.entry([number], what.strip())


def _usage(context: click.Context) -> str:
    return " ".join([context.command_path.replace(" [OPTIONS]", ""), *context.command.collect_usage_pieces(context)])


def _first_sentence(command: click.Command) -> str:
    text = " ".join(inspect.cleandoc(command.help or "").split())
    first = re.split(r"\.(?:\s|$)", text)[0]
    return first[:1].lower() + first[1:]
