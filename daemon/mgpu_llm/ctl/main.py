"""mgpuctl: asks the daemon over its control socket. Each verb is a module of this package, imported when it is used."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from mgpu_llm.core import instances
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.words import page, plain, say

VERBS = (
    "status",
    "attempts",
    "ladder",
    "plan",
    "gpus",
    "doctor",
    "logs",
    "config",
    "start",
    "stop",
    "restart",
    "reload",
    "forget",
    "replay",
    "incidents",
    "incident",
    "import-xinference",
)

EXIT_CODES = """\b
Exit codes:
  0  done; status: the model is served
  1  status: not served yet, but the daemon works on it; doctor: warnings
  2  the command line is wrong; replay: the file is no recording; plan: there is no such cause; doctor: problems
  3  no daemon answers on the socket
  4  not allowed to use the socket
  5  no answer in 5 s, or not one of a mgpud
  6  the engine is stopped (status, --wait)
  7  the engine has failed, the daemon gave up (status, --wait)
  8  the daemon refused, the result could not be written, config: it has problems, or plan, gpus: mgpud cannot make one"""


class Verbs(click.Group):
    """Imports a verb only when it is called: `mgpuctl status` is asked by scripts in loops and must be quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in VERBS:
            return cast(click.Command, importlib.import_module(f"mgpu_llm.ctl.{name.replace('-', '_')}").command)
        if ctx.resilient_parsing or name.startswith("-"):
            return None
        from difflib import get_close_matches  # for a mistake only; a status need not wait for it

        close = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(VERBS)}"
        return ctx.fail(f"no verb {name!r}; {hint}")

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            return _reader_left()
        return result


def _name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    if name is not None and not instances.is_name(name):
        raise click.BadParameter(f"{name!r} is no name of an instance: {instances.EXPECTED}")
    return name


def _names(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """For a shell that completes."""
    from mgpu_llm.ctl import overview  # a status need not wait for it

    return [CompletionItem(name) for name in overview.names() if name and name.startswith(begun)]


@click.group(
    cls=Verbs,
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "-i",
    "--instance",
    envvar="MGPU_LLM_INSTANCE",
    callback=_name,
    shell_complete=_names,
    show_envvar=True,
    metavar="NAME",
    help="Which daemon of several: the one of the unit mgpu-llm@NAME.",
)
@click.option(
    "--socket",
    envvar="MGPU_LLM_SOCKET",
    show_envvar=True,
    metavar="PATH",
    show_default=str(instances.socket("")),
    help="Where the daemon listens.",
)
@click.version_option(package_name="mgpu-llm", prog_name="mgpuctl")
@click.pass_context
def cli(ctx: click.Context, instance: str | None, socket: str | None) -> int:
    """Ask and steer the mgpu-llm daemon. Without a verb: which there are on this host."""
    ctx.obj = Client(_socket(ctx, instance, socket))
    if ctx.invoked_subcommand is not None:
        return exits.DONE
    from mgpu_llm.ctl import overview  # a status need not wait for it

    found = overview.names()
    say("\n".join(overview.overview_lines(found, page())) if found else ctx.get_help())
    return exits.DONE


def _socket(ctx: click.Context, instance: str | None, socket: str | None) -> str:
    """Whom to ask: what stands on the command line counts more than a variable, so that nobody stops another model."""
    by_hand = {name for name in ("instance", "socket") if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if instance and socket and len(by_hand) != 1:
        raise click.UsageError("an instance and a socket exclude each other (-i, --socket, and their variables)")
    if socket and by_hand != {"instance"}:
        return socket
    return str(instances.socket(instance or ""))


def main() -> int:
    """Runs mgpuctl and returns its exit code. Nothing that goes wrong here or in the daemon shows a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A model's name may hold characters that this terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace", encoding="ascii" if _ascii_only(stream) else None)
    try:
        result = cli.main(prog_name="mgpuctl", standalone_mode=False)
    except Failure as failure:
        return _said(plain(failure.message), failure.code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except OSError as error:
        return _said(f"cannot write the result: {error.strerror or error}", exits.REFUSED)
    except Exception as error:  # noqa: BLE001 - a fault of ours must reach an operator as one line too
        return _said(f"a fault in mgpuctl itself: {type(error).__name__}: {error}; please report it", exits.FAULT)
    return result if isinstance(result, int) else exits.DONE


def _ascii_only(stream: io.TextIOWrapper) -> bool:
    """A terminal whose user has asked for the locale C: Python writes UTF-8 there too (PEP 538, PEP 540), and it would
    show as garbage. Where nothing is set, as in most containers, nothing was asked for."""
    if not stream.isatty() or os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8"):
        return False
    category = os.environ.get("LC_CTYPE", "")
    coerced = category == "C.UTF-8"  # what PEP 538 makes of LANG=C, in our own environment
    asked = os.environ.get("LC_ALL") or ("" if coerced else category) or os.environ.get("LANG")
    return asked in ("C", "POSIX")


def _said(message: str, code: int) -> int:
    click.echo(f"mgpuctl: {message}", err=True)
    _drop_stdout()
    return code


def _reader_left() -> int:
    """`mgpuctl status | head -1`: end as every filter does, without a word."""
    _drop_stdout()
    return exits.READER_LEFT


def _drop_stdout() -> None:
    """What is still buffered cannot be written; the interpreter would try once more at its end and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
