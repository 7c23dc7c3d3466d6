"""How mgpuctl words amounts and draws lines, for a terminal and for a pipe."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is written on. `width` is None where lines are not to be wrapped: behind a pipe they are for grep."""

    colour: bool
    width: int | None
    bullet: str

    def paint(self, text: str, colour: str | None = None, *, bold: bool = False, dim: bool = False) -> str:
        return click.style(text, fg=colour, bold=bold or None, dim=dim or None) if self.colour else text

    def wrap(self, text: str, indent: int) -> list[str]:
        """The text's lines, cut between words to leave room for `indent` columns; an empty text is no line."""
        lines = [plain(line) for line in text.split("\n") if line.strip()]
        if self.width is None:
            return lines
        room = max(self.width - indent, 30)
        cut = (textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) for line in lines)
        return [part for parts in cut for part in parts]


def page() -> Page:
    """The page that standard output is: colour only on a terminal that wants it (https://no-color.org)."""
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    bullet = "●" if encoding == "utf8" else "*"
    if not sys.stdout.isatty():
        return Page(colour=False, width=None, bullet=bullet)
    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Page(colour=colour, width=min(os.get_terminal_size(sys.stdout.fileno()).columns or 80, 120), bullet=bullet)


def plain(text: str) -> str:
    """One line that cannot steer a terminal: the engine's words reach people through here."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def one_line(text: str) -> str:
    return plain(" ".join(text.split()))


def _escaped(char: str) -> str:
    return "    " if char == "\t" else char.encode("unicode_escape").decode("ascii")


def span(seconds: float) -> str:
    """3.2 s, 41 s, 2 min 5 s, 3 h 12 min, 4 d 2 h."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    for unit, unit_s, below, below_s in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= unit_s:
            rest = whole % unit_s // below_s
            return f"{whole // unit_s} {unit} {rest} {below}" if rest else f"{whole // unit_s} {unit}"
    return f"{whole} s"


def size(count_bytes: int) -> str:
    """In GiB, as vLLM and nvidia-smi talk about GPU memory."""
    return f"{count_bytes / 2**30:.1f} GiB"


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, two spaces apart."""
    table = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
