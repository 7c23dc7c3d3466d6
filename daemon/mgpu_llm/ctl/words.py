"""How mgpuctl words amounts and draws lines, for a terminal and for a pipe."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is written on. `width` is None where lines are not to be wrapped: behind a pipe they are for grep.
    `encoding` is what it can show, as Python names it; elsewhere than in UTF-8 things are drawn with ASCII."""

    colour: bool
    width: int | None
    encoding: str = "utf-8"

    @property
    def unicode(self) -> bool:
        return self.encoding.lower().replace("-", "") == "utf8"

    @property
    def bullet(self) -> str:
        return "●" if self.unicode else "*"

    @property
    def ellipsis(self) -> str:
        return "…" if self.unicode else "..."

    def shown(self, text: str) -> str:
        """The text with escapes for what the encoding lacks, so that it is as wide as it looks."""
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def paint(self, text: str, colour: str | None = None, *, bold: bool = False, dim: bool = False) -> str:
        return click.style(text, fg=colour, bold=bold or None, dim=dim or None) if self.colour else text

    def cut(self, text: str, room: int) -> str:
        """One line of at most `room` columns of a terminal: what is too long loses its end."""
        text = self.shown(plain(text))
        return text if cells(text) <= room else _within(text, room - len(self.ellipsis)).rstrip() + self.ellipsis

    def squeeze(self, text: str, room: int) -> str:
        """As `cut`, but what is too long loses its middle: the path of a model ends with its name."""
        text = self.shown(plain(text))
        if cells(text) <= room:
            return text
        tail = _within(text[::-1], (room - len(self.ellipsis)) * 2 // 3)[::-1]
        return self.cut(text, room - cells(tail)) + tail

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
    encoding = sys.stdout.encoding or "ascii"
    if not sys.stdout.isatty():
        return Page(colour=False, width=None, encoding=encoding)
    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = min(os.get_terminal_size(sys.stdout.fileno()).columns or 80, 120)
    return Page(colour=colour, width=width, encoding=encoding)


def say(text: str) -> None:
    """To standard output as it is: click by itself takes one that speaks ASCII for a mistake and writes UTF-8."""
    click.echo(text, file=sys.stdout)


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


def limit(seconds: float) -> str:
    """As `span`, for what was set and not measured: "8 s" and not "8.0 s"."""
    return f"{seconds:g} s" if 0 <= seconds < 10 else span(seconds)


def about(seconds: float) -> str:
    """A time that is only guessed, as coarse as the guess and as in the headline: about 7 s, about 45 s, about 9 min."""
    if seconds < 90:
        return f"about {max(round(seconds) if seconds < 10 else round(seconds / 5) * 5, 0)} s"
    return f"about {span(round(seconds / 60) * 60)}"


def rate(bytes_per_s: float) -> str:
    """In MB/s, as disks and networks are sold: 4.2 MB/s, 120 MB/s."""
    megabytes = bytes_per_s / 1e6
    return f"{megabytes:.0f} MB/s" if megabytes >= 9.95 else f"{megabytes:.1f} MB/s"


def percent(of_hundred: float) -> str:
    """Whole percent; 100 % is said only when all of it is done."""
    return "100 %" if of_hundred >= 100 else f"{min(max(round(of_hundred), 0), 99)} %"


def size(count_bytes: int) -> str:
    """In GiB, as vLLM and nvidia-smi talk about GPU memory."""
    return f"{count_bytes / 2**30:.1f} GiB"


def cells(text: str) -> int:
    """How many columns of a terminal the printable `text` takes."""
    return sum(_cell(char) for char in text)


def _cell(char: str) -> int:
    if char.isascii():
        return 1
    return 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _within(text: str, room: int) -> str:
    """As much of the beginning as fits."""
    for at, char in enumerate(text):
        room -= _cell(char)
        if room < 0:
            return text[:at]
    return text


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, two spaces apart."""
    table = [[plain(cell) for cell in row] for row in rows]
    widths = [max(cells(cell) for cell in column) for column in zip(*table, strict=True)]
    return ["  ".join(filled(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def filled(text: str, width: int) -> str:
    """The text with blanks up to `width` columns."""
    return text + " " * (width - cells(text))
