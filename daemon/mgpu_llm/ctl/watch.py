"""What is drawn anew until Ctrl-C; of mgpuctl status --watch: the load in bars, or the status page, twice a second."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mgpu_llm.core.status import Status
from mgpu_llm.ctl import bars, exits
from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.layout import status_lines
from mgpu_llm.ctl.load import steps
from mgpu_llm.ctl.words import page, plain

EVERY_S = 0.5
#: Lines for a terminal of so many columns and rows, and whether they are a picture. May raise Failure.
Look = Callable[[int, int], tuple[list[str], bool]]


def watch_status(client: Client) -> int:
    """Survives the daemon: while none answers it says so, and goes on asking."""

    def look(width: int, height: int) -> tuple[list[str], bool]:
        status = client.status()
        with client.making_sense():
            return _lines(status, width, height)

    return watch(look, _Steps(client).show, every_s=EVERY_S, verb="status")


def watch(look: Look, show: Callable[[], None], *, every_s: float, verb: str) -> int:
    """Draw what `look` gives, or where nothing can be drawn over, `show` it; `verb` is where all of it is, without --watch."""
    console = Console(file=sys.stdout, highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminal must be given back as it was
    try:
        if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
            _draw(_Picture(look, console, every_s, verb), console, every_s)
        else:
            _repeat(show, every_s)
    except KeyboardInterrupt:
        return exits.DONE


def _repeat(show: Callable[[], None], every_s: float) -> NoReturn:
    while True:
        show()
        time.sleep(every_s)


def _draw(picture: _Picture, console: Console, every_s: float) -> NoReturn:
    """On the terminal's other screen, cell over cell: nothing flickers, nothing is left over when its size changes."""
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def step_aside(*_: object) -> None:  # Ctrl-Z: the shell wants its own screen, with a cursor
        live.stop()
        signal.raise_signal(signal.SIGSTOP)
        live.start(refresh=True)

    signal.signal(signal.SIGTSTP, step_aside)
    try:
        with live:
            _repeat(lambda: live.update(picture.now(), refresh=True), every_s)
    finally:
        console.print(picture.last)


class _Picture:
    """What is on the screen; `last` remains for the scrollback when the other screen is gone."""

    def __init__(self, look: Look, console: Console, every_s: float, verb: str) -> None:
        self._look = look
        self._console = console
        self._every_s = every_s
        self._verb = verb
        self.last = Text()

    def now(self) -> Text:
        # Measured on our own stream, each time: rich looks at standard input first, which may be elsewhere.
        size = os.get_terminal_size(sys.stdout.fileno())
        width, height = size.columns or 80, size.lines or 24
        self._console.size = (width, height)
        try:
            lines, whole = self._look(width, height)
        except Failure as failure:
            lines = [
                f"mgpuctl: {plain(failure.message)}",
                "",
                f"(asking again every {self._every_s:g} s, end with Ctrl-C)",
            ]
            whole = False
        self.last = self._fitted("\n".join(lines), height, whole=whole)
        return self.last

    def _fitted(self, text: str, height: int, *, whole: bool) -> Text:
        """As many lines as there is room for; lines of a picture are cut at the edge, those of a page go on below."""
        shown = Text.from_ansi(page().shown(text))
        lines = list(
            shown.wrap(self._console, self._console.width, overflow="crop" if whole else "fold", no_wrap=whole)
        )
        if len(lines) > height:
            lines[height - 1 :] = [Text(f"({len(lines) - height + 1} more lines: mgpuctl {self._verb})")]
        return Text("\n").join(lines)


def _lines(status: Status, width: int, height: int) -> tuple[list[str], bool]:
    """The lines, and whether they are a picture."""
    if status.state == "starting" and status.phases:
        return bars.load_lines(status, bars.Canvas(page=page(), width=width, height=height)), True
    return status_lines(status, page()), False


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
