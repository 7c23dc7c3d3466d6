"""mgpuctl logs: the engine's last lines from the daemon's memory; what was said before, and is said from now on, from the
journal."""

from __future__ import annotations

import click

from mgpu_llm.control_api import MOST_LINES
from mgpu_llm.core import engine_log, journal_fields
from mgpu_llm.ctl import exits, journal
from mgpu_llm.ctl.client import Client
from mgpu_llm.ctl.words import page, plain, say

LAST_LINES = 50


@click.command("logs")
@click.option(
    "-n",
    "--lines",
    "count",
    type=click.IntRange(1, MOST_LINES),
    help="So many of the last lines; 50, but with --since all.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said from now on, until Ctrl-C (journal).")
@click.option(
    "--since", metavar="WHEN", help='From then on, as journalctl has it: -1h, today, "2026-11-25 10:00" (journal).'
)
@click.option("--engine", "source", flag_value=journal_fields.ENGINE, help="Only what the engine says.")
@click.option(
    "--daemon", "source", flag_value=journal_fields.DAEMON, help="Only what the daemon itself says (journal)."
)
@click.option("--rank", type=click.IntRange(min=0), help="Only what the worker of this rank says (Worker_TP1 for 1).")
@click.option("--unit", help="Whose journal; by default that of the daemon on the socket.")
@click.pass_obj
def command(
    client: Client,
    *,
    count: int | None,
    follow: bool,
    since: str | None,
    source: str | None,
    rank: int | None,
    unit: str | None,
) -> int:
    """The engine's last lines of output, oldest first; or what the journal has of engine and daemon.

    The options with "journal" read systemd's journal, which members of the groups systemd-journal and adm may. Without any of
    these the daemon is asked, which keeps the engine's last lines.
    """
    if source == journal_fields.DAEMON and rank is not None:
        raise click.UsageError("--daemon and --rank exclude each other: ranks are the engine's")
    if follow or since is not None or unit is not None or source == journal_fields.DAEMON:
        matches = [f"{journal_fields.SOURCE}={source}"] if source is not None else []
        matches += [f"{journal_fields.RANK}={rank}"] if rank is not None else []
        lines = count if since is not None else count or LAST_LINES
        return _of_journal(client, unit, matches, since=since, count=lines, follow=follow)
    return _of_memory(client, count or LAST_LINES, rank)


def _of_journal(
    client: Client, unit: str | None, matches: list[str], *, since: str | None, count: int | None, follow: bool
) -> int:
    journal.require_readable()
    unit = unit or journal.unit_of(client.path)
    here, silent = page(), True
    for entry in journal.entries(unit, matches, since=since, count=count, follow=follow):
        silent = False
        say(journal.shown(entry, here))
    if silent:
        click.echo(f"mgpuctl: the journal of {unit} has no such line", err=True)
    return exits.DONE


def _of_memory(client: Client, count: int, rank: int | None) -> int:
    if rank is None:
        lines = client.engine_lines(count)
    else:
        lines = tuple(line for line in client.engine_lines(MOST_LINES) if _rank(line) == str(rank))[-count:]
    if lines:
        say("\n".join(plain(line) for line in lines))
    else:
        who = "engine has" if rank is None else f"worker of rank {rank} has"
        click.echo(f"mgpuctl: the {who} printed nothing yet", err=True)
    return exits.DONE


def _rank(line: str) -> str:
    return journal_fields.rank(engine_log.parse(line).process)
