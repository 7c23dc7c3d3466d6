"""For a person at a terminal: one live line at the bottom, log lines above it. Elsewhere there is no live line."""

from __future__ import annotations

import os
from typing import TextIO

import rich.console
from rich.live import Live
from rich.text import Text

from mgpu_llm.core.status import Count, Status

BAR_CELLS = 10
STYLES = {"ready": "green", "failed": "red", "stopped": "dim"}


class Console:
    """Owns the terminal that `stream` is: everything shown there goes through `show` and `write`, in one thread.

    Give `write` to `journal.configure`. A terminal that has gone away is left alone: nothing here raises OSError.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = ""
        self._live: Live | None = None
        self._rich: rich.console.Console | None = None
        terminal = rich.console.Console(file=stream, highlight=False)
        if self._terminal and not terminal.is_dumb_terminal:
            self._rich = terminal

    @property
    def is_terminal(self) -> bool:
        """Whether it was one when we began."""
        return self._terminal

    def show(self, status: Status) -> None:
        """Draws the live line, if it has changed."""
        if self._rich is None:
            return
        line = live_line(status)
        if line.plain == self._shown and self._live is not None:
            return
        self._shown = line.plain
        try:
            # Measured on our own stream, each time: rich looks at standard input first, which may be elsewhere.
            self._rich.width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._started(self._rich).update(line, refresh=True)
        except OSError:
            self._rich = self._live = None

    def write(self, line: str) -> None:
        """Prints one line, which may hold colours, above the live line. A line that cannot be written is lost."""
        try:
            if self._rich is None or self._live is None:
                self._stream.write(line + "\n")
                self._stream.flush()
            else:
                self._rich.print(Text.from_ansi(line), soft_wrap=True)
        except OSError:
            self._rich = self._live = None

    def close(self) -> None:
        """Takes the live line away; `write` goes on working."""
        live, self._live = self._live, None
        try:
            if live is not None:
                live.stop()
        except OSError:
            self._rich = None

    def _started(self, console: rich.console.Console) -> Live:
        if self._live is None:
            self._live = Live(
                console=console,
                auto_refresh=False,  # the daemon's loop draws, no second thread
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
            console.show_cursor(True)  # whoever is killed by SIGKILL cannot give a hidden cursor back
        return self._live


def live_line(status: Status) -> Text:
    """State or phase, how far it is, seconds, attempt and rung, cut at the terminal's edge: a line that wraps cannot be
    redrawn. Only ASCII is added to what the config names: the terminal may speak nothing else."""
    words = [status.phase if status.state == "starting" else status.state]
    if status.state == "starting":
        words += _progress(status)
    if status.retry_in_s is not None:
        words += [f"next attempt in {status.retry_in_s:.0f} s"]
    if status.elapsed_s > 0:
        words += [f"{status.elapsed_s:.0f} s"]
    if status.state == "starting" and status.quiet_s is not None and status.quiet_s >= 3:
        words += [f"quiet for {status.quiet_s:.0f} s"]
    if status.state not in ("stopped", "failed"):
        words += [f"attempt {status.attempt}", f"rung {status.rung}"]
    if status.degraded:
        words += ["degraded"]
    style = "yellow" if status.degraded else STYLES.get(status.state, "cyan")
    line = Text(no_wrap=True, overflow="crop", end="")
    line.append(words[0], style=f"bold {style}")
    return line.append("".join(f"  {word}" for word in words[1:]))


def _progress(status: Status) -> list[str]:
    """How far the phase is; of the weights as percent and rate where the daemon knows them; and what is left of it all."""
    if status.phase == "weights" and status.weights_percent is not None:
        words = [f"{_bar(status.weights_percent / 100)} {status.weights_percent:.0f} %"]
    else:
        words = [
            f"{name} {_bar(count.done / max(count.total, 1))} {count.done}/{count.total}"
            for name, count in _counts(status)
        ]
    if status.phase == "weights" and status.weights_bytes_per_s is not None:
        words += [f"{status.weights_bytes_per_s / 1e6:.0f} MB/s"]
    if (left_s := status.left_s) is not None:
        words += [f"~{left_s / 60:.0f} min left" if left_s >= 90 else f"~{left_s:.0f} s left"]
    return words


def _counts(status: Status) -> list[tuple[str, Count]]:
    counts = (("shards", status.shards if status.phase == "weights" else None), ("graphs", status.graphs))
    return [(name, count) for name, count in counts if count is not None]


def _bar(share: float) -> str:
    filled = int(BAR_CELLS * min(max(share, 0.0), 1.0))
    return f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}]"
