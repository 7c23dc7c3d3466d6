"""mgpuctl status --watch: the status page, drawn anew twice a second, until Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.layout import status_lines, steps
from mgpu_llm.ctl.words import page, plain

EVERY_S = 0.5


def watch_status(client: Client) -> int:
    """Survives the daemon: while none answers it says so, and goes on asking."""
    try:
        if sys.stdout.isatty():
            console = Console(file=sys.stdout, highlight=False)
            with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
                _repeat(lambda: live.update(Text.from_ansi(_page(client)), refresh=True))
        else:
            _repeat(_Steps(client).show)
    except KeyboardInterrupt:
        return exits.DONE


def _repeat(show: Callable[[], None]) -> NoReturn:
    while True:
        show()
        time.sleep(EVERY_S)


def _page(client: Client) -> str:
    try:
        status = client.status()
        with client.making_sense():
            return "\n".join(status_lines(status, page()))
    except Failure as failure:
        return f"mgpuctl: {plain(failure.message)}\n\n(asking again every {EVERY_S:g} s, end with Ctrl-C)"


class _Steps:
    """Behind a pipe nothing can be drawn over: one line for each step."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last = ""

    def show(self) -> None:
        try:
            status = self._client.status()
            with self._client.making_sense():
                words = steps(status)
        except Failure as failure:
            words = f"mgpuctl: {plain(failure.message)}"
        if words != self._last:
            self._last = words
            print(words, flush=True)
