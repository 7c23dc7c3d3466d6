"""What the shipped file says of each table and key. Its comments are the one text that schema and manual are made of.

A comment above keys is about all of them up to the next comment or empty line, one above a table's name about that table, and
one behind a key about that key alone. Keys that are commented out count too, for not all have a default to be written.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SHIPPED: Final = Path(__file__).with_name("mgpu-llm.toml")
_TABLE: Final = re.compile(r"\[{1,2}([\w.]+)\]{1,2}")


def descriptions(text: str) -> dict[str, str]:
    """By "gpus", "gpus.use", "ladder.rungs.name"; "" is the file itself. Keys of which nothing is said are left out."""
    found, table, block, about = dict[str, str](), "", list[str](), ""
    for line in text.splitlines():
        bare = line.removeprefix("#").strip()
        if not line.strip():
            if block and not found:
                found[""] = reflowed(block)
            block, about = [], ""
        elif name := _TABLE.fullmatch(bare):
            found.setdefault(name[1], reflowed(block))
            table, block, about = name[1], [], ""
        elif setting := _setting(bare):
            key, behind = setting
            about, block = reflowed(block) or about, []
            if behind or about:
                found.setdefault(f"{table}.{key}", _sentence(behind) or about)
        else:
            block.append(line.removeprefix("#").removeprefix(" "))
    return found


def _setting(line: str) -> tuple[str, str] | None:
    """The key of a line that sets one, and the comment behind it; None for any other line."""
    for setting, comment in _cuts(line):
        try:
            (key,) = tomllib.loads(setting)
        except ValueError:
            continue
        return key, comment
    return None


def _cuts(line: str) -> Iterator[tuple[str, str]]:
    """Where a comment may begin: a # may be part of a string too."""
    for found in re.finditer(r"#|$", line):
        yield line[: found.start()], line[found.end() :].strip()


def _sentence(text: str) -> str:
    """Behind a key there is room for a few words only, begun with a small letter."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def reflowed(lines: Sequence[str]) -> str:
    """Paragraphs as one line each; what is indented is a list, with a line for each of its entries."""
    text, before = "", ""
    for line in lines:
        entry = line.startswith("  ")
        if text:
            text += "\n\n" if not line else "\n" if entry or before.startswith("  ") else " " if before else ""
        text += re.sub(r"^(\S.*?)\s{2,}", r"\1: ", line.strip()) if entry else line
        before = line
    return text.strip()
