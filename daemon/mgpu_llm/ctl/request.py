"""start, stop and restart: ask, and with --wait follow the daemon until it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from mgpu_llm.core.status import Status
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.load import steps
from mgpu_llm.ctl.words import one_line, plain, say, span

POLL_S = 0.5
#: The daemon takes a request up in its next pass. If nothing has changed after this long, nothing is going to.
TAKEN_UP_S = 10.0
#: A stop that was under way may pass through "stopped" before the start that was asked for begins.
SETTLED_S = 1.0
WANTED = {"start": "ready", "stop": "stopped", "restart": "ready"}


def carry_out(client: Client, verb: str, *, wait: bool) -> int:
    before = client.status() if wait else None
    say(plain(client.ask_for(verb)))
    if before is None:
        return exits.DONE
    try:
        return _wait(client, verb, before)
    except KeyboardInterrupt:
        click.echo("mgpuctl: no longer waiting; the daemon goes on with it", err=True)
        return exits.INTERRUPTED
    except Failure as failure:
        if failure.code == exits.NO_DAEMON:
            message = f"the daemon ended meanwhile; it says why in: journalctl -u {client.unit} -n 50"
            raise Failure(message, exits.NO_DAEMON) from failure
        raise


def _wait(client: Client, verb: str, before: Status) -> int:
    seen, since_s, told = (before.state, before.attempt), 0.0, ""
    for waited_s, status in _polled(client):
        with client.making_sense():
            words = steps(status)
        if words != told:
            told = words
            click.echo(f"[{span(waited_s)}] {words}", err=True)
        if (status.state, status.attempt) != seen:
            seen, since_s = (status.state, status.attempt), waited_s
        fresh = seen != (before.state, before.attempt)
        if status.state == WANTED[verb] and (fresh or verb != "restart"):
            break
        if waited_s - since_s >= (SETTLED_S if fresh else TAKEN_UP_S):
            _refuse_to_wait_for_ever(verb, status)
    return exits.DONE


def _refuse_to_wait_for_ever(verb: str, status: Status) -> None:
    """Called with a state that has stood for a while: raises if it is an end, returns if the daemon is at work."""
    code = exits.of_state(status.state)
    if code in (exits.STOPPED, exits.FAILED):
        raise Failure(f"{verb} did not succeed: {one_line(status.headline)}; see: mgpuctl status", code)
    if code == exits.DONE:
        raise Failure(f"{verb} was accepted, yet the engine goes on serving; see: mgpuctl status", exits.REFUSED)


def _polled(client: Client) -> Iterator[tuple[float, Status]]:
    began = time.monotonic()
    while True:
        yield time.monotonic() - began, client.status()
        time.sleep(POLL_S)
