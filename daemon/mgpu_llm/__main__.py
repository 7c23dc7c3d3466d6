"""mgpud: arguments, config and environment in; the adapters and the loop out; an exit status that systemd understands."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import structlog

import mgpu_llm
from mgpu_llm import life, questions
from mgpu_llm.adapters import journal, streams
from mgpu_llm.adapters.systemd import SystemdNotifier
from mgpu_llm.config import files
from mgpu_llm.startup import BAD_CONFIG, CannotStartError

#: A fault of ours (sysexits.h); the other exit statuses are the core's (0, 65, 69), those of a start and of a wrong command line.
FAULT: Final = 70

log = structlog.get_logger()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=files.DEFAULT_PATH,
    show_default=True,
    help="The main config file; conf.d/*.toml beside it are laid over it.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Print every problem of the config and exit: 0 without, 78 with, 75 where the GPUs cannot be seen.",
)
@click.option(
    "--plan",
    "cause",
    metavar="CAUSE",
    help='Print as JSON what would be tried against a cause ("unknown": one that nobody knows), and exit. Starts nothing.',
)
@click.option(
    "--doctor",
    is_flag=True,
    help="Print as JSON what on this host would make a start fail, each with its fix, and exit. Starts nothing.",
)
@click.option(
    "--gpus",
    is_flag=True,
    help="Print as JSON the GPUs of this host, who uses them and what joins them, and exit: 75 where the driver is silent.",
)
@click.option(
    "--show-config",
    is_flag=True,
    help="Print as JSON the config's values and where each is from, and exit: 78 with problems.",
)
@click.option(
    "--schema", is_flag=True, help="Print the JSON schema of the config, by which editors complete it, and exit."
)
@click.option("--user", metavar="NAME", help="With --doctor: who will run the daemon.")
@click.option("--probe", is_flag=True, help="With --doctor: let the GPUs work too, three minutes at most.")
@click.option("--force", is_flag=True, help="With --probe: also where somebody uses them.")
@click.version_option(mgpu_llm.__version__, prog_name="mgpud")
def main(
    config_file: Path,
    cause: str | None,
    user: str | None,
    *,
    check: bool,
    doctor: bool,
    probe: bool,
    force: bool,
    gpus: bool,
    show_config: bool,
    schema: bool,
) -> None:
    """Supervise a vLLM server: bring it to service, through stalls, and keep it there.

    \b
    Exit status: 0 stopped on request; 2 a wrong command line; 65 no retry can help; 69 gave up, the ladder is spent;
    70 a fault in mgpud; 75 try again (another daemon runs or has a GPU, or the driver cannot be reached); 78 the config is wrong.
    """
    asked: list[tuple[bool, Callable[[], Coroutine[Any, Any, int]]]] = [
        (check, partial(questions.check, config_file)),
        (cause is not None, partial(questions.plan, config_file, cause or "")),
        (doctor, partial(questions.doctor, config_file, user, probe=probe, force=force)),
        (gpus, questions.gpus),
        (show_config, partial(questions.config, config_file)),
        (schema, questions.schema),
    ]
    answers = [answer for wanted, answer in asked if wanted]
    if len(answers) > 1:
        options = "--schema, --show-config, --check, --plan, --doctor and --gpus"
        raise click.UsageError(f"{options} are several questions; ask one of them")
    if (user is not None or probe) and not doctor:
        raise click.UsageError("--user and --probe are about --doctor")
    if force and not probe:
        raise click.UsageError("--force is about --probe")
    streams.mend()
    # An engine's exit status would be thrown away by the kernel under what a careless parent hands down.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Before the first thing that can fail: structlog's own way to show a fault prints every variable, secrets included.
    journal.configure("info", os.environ, sys.stderr)
    notifier = SystemdNotifier(os.environ)
    try:
        answer = answers[0] if answers else partial(life.supervise, config_file, notifier)
        sys.exit(asyncio.run(answer()))
    except CannotStartError as problem:
        if not journal.cannot_start(problem.message, problem.status, config=problem.status == BAD_CONFIG):
            streams.tell(problem.message, sys.stderr)
        # The first line is what `systemctl status` shows of a start that failed.
        notifier.status(problem.message.partition("\n")[0])
        sys.exit(problem.status)
    except Exception as fault:
        log.exception("daemon.fault", error=f"{type(fault).__name__}: {fault}")
        notifier.status(f"a fault in mgpud: {type(fault).__name__}: {fault}")
        sys.exit(FAULT)


if __name__ == "__main__":
    main()
