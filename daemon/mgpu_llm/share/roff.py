"""Pages for man(1), in the macros of man(7) as groff and mandoc know them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

#: What roff would take for something else, or set as another character than the one that is to be copied.
_ESCAPED: Final = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", '"': "\\(dq"}
_CODE: Final = re.compile(r"`([^`\n]+)`")


class Page:
    """One page. `title` is its name, `section` a digit, `what` the few words behind the name; `version` stands at its foot."""

    def __init__(self, title: str, section: int, version: str, what: str) -> None:
        self._lines = [f'.TH "{escaped(title)}" "{section}" "" "mgpu\\-llm {escaped(version)}" "mgpu\\-llm"']
        # No hyphenation and no justified lines: what is read here is copied.
        self._lines += [".nh", ".ad l"]
        self.section("NAME")
        self._lines.append(f"{escaped(title)} \\- {escaped(what)}")

    def section(self, title: str) -> None:
        self._lines.append(f'.SH "{escaped(title)}"')

    def subsection(self, title: str) -> None:
        self._lines.append(f'.SS "{escaped(title)}"')

    def text(self, text: str) -> None:
        """Paragraphs between empty lines. Line ends within them are kept; what stands in backquotes is bold."""
        for paragraph in filter(None, re.split(r"\n\s*\n", text.strip())):
            self._lines += [".PP", *_broken(paragraph.split("\n"))]

    def as_it_is(self, lines: Sequence[str]) -> None:
        """Lines that stay what they are, a bit to the right."""
        self._lines += [".PP", ".RS 4", ".nf", *(_line(escaped(line)) for line in lines), ".fi", ".RE"]

    def entry(self, heads: Sequence[str], text: str) -> None:
        """Bold heads, one below the other, and what is said of them."""
        for macro, head in zip([".TP", *[".TQ"] * len(heads)], heads, strict=False):
            self._lines += [macro, f"\\fB{escaped(head)}\\fR"]
        for number, paragraph in enumerate(filter(None, re.split(r"\n\s*\n", text.strip()))):
            self._lines += [*([".IP"] if number else []), *_broken(paragraph.split("\n"))]

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def escaped(text: str) -> str:
    """The text as roff shows it again, character by character; what is not ASCII by its number."""
    return "".join(_ESCAPED.get(char, char if char.isascii() else f"\\[u{ord(char):04X}]") for char in text)


def _broken(lines: Sequence[str]) -> list[str]:
    """Lines of text, each on a line of its own."""
    set_ = [_line(_CODE.sub(lambda code: f"\\fB{code[1]}\\fR", _escaped_but_code(line))) for line in lines]
    return [part for line in set_ for part in (".br", line)][1:]


def _escaped_but_code(line: str) -> str:
    return "`".join(escaped(part) for part in line.split("`"))


def _line(text: str) -> str:
    """A line that roff does not take for a request."""
    return f"\\&{text}" if text.startswith((".", "'")) else text
