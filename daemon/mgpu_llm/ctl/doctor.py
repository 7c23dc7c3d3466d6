"""mgpuctl doctor: what on this host would make a start over several GPUs fail. mgpud finds out; no daemon is needed."""

from __future__ import annotations

import json
import pwd
from typing import Final

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.doctor_page import doctor_lines, worst
from mgpu_llm.ctl.mgpud import Question
from mgpu_llm.ctl.words import page, say

#: A probe of the GPUs takes minutes at most.
PROBE_S: Final = 300.0


def _user(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    try:
        if name is not None:
            pwd.getpwnam(name)
    except KeyError:
        raise click.BadParameter(f"there is no user {name!r}") from None
    return name


@click.command("doctor", short_help="What on this host would make a start fail, and the fix.")
@click.option(
    "--config", type=click.Path(), metavar="FILE", help="The config to look at, instead of mgpud's usual one."
)
@click.option(
    "--user", callback=_user, metavar="NAME", help="Who will run the daemon; by default the service's user, or you."
)
@click.option("--probe", is_flag=True, help="Let the GPUs work too: each alone, in pairs, and all over NCCL.")
@click.option("--force", is_flag=True, help="With --probe: also while an engine runs on them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def command(client: Client, config: str | None, user: str | None, *, probe: bool, force: bool, as_json: bool) -> int:
    """Look at driver, devices, GPUs, links, memory, limits, disks, model, engine, ports and config, and say what would make a
    start over several GPUs fail, each with its fix.

    It changes nothing, and without --probe no GPU works. As root it sees more, and looks as the service's user. Without a config
    it looks at the host alone.

    \b
    Exit status: 0 nothing found; 1 warnings; 2 problems. What is not known counts for neither.
    """
    if force and not probe:
        raise click.UsageError("--force is about --probe")
    words = ["--doctor", *(["--config", config] if config else client.config), *(["--user", user] if user else [])]
    words += [*(["--probe"] if probe else []), *(["--force"] if force else [])]
    question = Question(words=tuple(words), doing="examine this host", limit_s=PROBE_S if probe else None)
    document = question.document(question.run())
    try:
        lines, status = doctor_lines(document, page()), worst(document)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Failure("cannot examine this host: mgpud --doctor printed another document", exits.NO_ANSWER) from error
    say(json.dumps(document, indent=2) if as_json else "\n".join(lines))
    return status
