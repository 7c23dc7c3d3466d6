"""A terminal small enough to trust: a pseudo-terminal, and what a person would see on it."""

from __future__ import annotations

import os
import re
import struct
import termios
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from typing import Final

CONTROL: Final = re.compile(r"\x1b\[(\??)(\d*(?:;\d+)*)([A-Za-z])")


class Screen:
    """Rows of characters that obey what rich sends: cursor up, erase line, carriage return, wrapping at the edge, home,
    and the other screen, which is empty when it is entered and forgotten when it is left.

    Rows never scroll away, so all that was ever printed can be looked at. An unknown sequence fails the test.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: list[list[str]] = [[]]
        self.row = 0
        self.column = 0
        self.cursor_visible = True
        self.left: tuple[list[list[str]], int, int] | None = None

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                match = CONTROL.match(text, at)
                assert match, f"unknown control sequence {text[at : at + 12]!r}"
                self._control(*match.groups())
                at = match.end()
            else:
                self._put(text[at])
                at += 1

    @property
    def lines(self) -> list[str]:
        return [line for row in self.rows if (line := "".join(row).rstrip())]

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down()
        else:
            if self.column == self.width:
                self._down()
                self.column = 0
            row = self.rows[self.row]
            wide = unicodedata.east_asian_width(char) in "WF"
            row += [" "] * (self.column + 1 + wide - len(row))
            row[self.column : self.column + 1 + wide] = [char, ""] if wide else [char]
            self.column += 1 + wide

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _control(self, private: str, given: str, verb: str) -> None:
        match private, given, verb:
            case "?", "25", _:
                self.cursor_visible = verb == "h"
            case "?", "1049", "h":
                self.left = self.rows, self.row, self.column
                self.rows, self.row, self.column = [[]], 0, 0
            case "?", "1049", "l":
                assert self.left, "the other screen is left and was not entered"
                (self.rows, self.row, self.column), self.left = self.left, None
            case "", "", "H":
                self.row = self.column = 0
            case "", _, "A":
                self.row = max(0, self.row - int(given or 1))
            case "", "2", "K":
                self.rows[self.row] = []
            case "", _, "m":
                pass
            case _:
                raise AssertionError(f"unknown control sequence {private}{given}{verb}")


class Terminal:
    """What was written to the pseudo-terminal so far; `slave` is for the process that is to have it."""

    def __init__(self, slave: int, width: int) -> None:
        self.slave = slave
        self.raw = ""
        self._width = width

    @property
    def screen(self) -> Screen:
        screen = Screen(self._width)
        text = self.raw
        cut = text.rfind("\x1b")
        # A sequence may have arrived in part only.
        screen.feed(text if cut < 0 or CONTROL.match(text, cut) else text[:cut])
        return screen

    @property
    def text(self) -> str:
        return "\n".join(self.screen.lines)


@contextmanager
def terminal(width: int = 100, height: int = 50) -> Iterator[Terminal]:
    master, slave = os.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    seen = Terminal(slave, width)

    def read() -> None:
        pending = b""
        while True:
            try:
                pending += os.read(master, 65536)
            except OSError:  # EIO: nobody has the other end open any more
                return
            text = pending.decode("utf-8", "ignore")
            pending = pending[len(text.encode()) :]
            seen.raw += text

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        os.close(slave)
        reader.join(30)
        os.close(master)
