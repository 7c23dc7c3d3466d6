"""What a line must have in it for a pattern to match at all: a plain search for that is a hundred times as fast."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_PIECE: Final = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]])*\]|\(\?P<\w+>|\(\?:|\(\?<?[=!]|\(|\)|\||(?:[?*+]|\{\d*,?\d*\})\??|.", re.DOTALL
)
_OPTIONAL: Final = frozenset("?*{")
#: What stands for other characters than itself, escaped or not.
_NO_TEXT: Final = re.compile(r"\\[A-Za-z0-9]|\[.*|[.^$]", re.DOTALL)


@dataclass
class _Part:
    """The pattern, or a group of it: the texts that it must match, the last one still growing."""

    texts: list[str] = field(default_factory=lambda: [""])
    alternatives: bool = False
    looks_around: bool = False

    def end(self) -> None:
        self.texts.append("")


def anchor(pattern: str) -> str:
    """The longest text that is in whatever the pattern matches; "" where there is none. The pattern is a valid one."""
    parts = [_Part()]
    pieces = _PIECE.findall(pattern)
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=False):
        part = parts[-1]
        optional = following[:1] in _OPTIONAL and following != ""
        if piece.startswith("("):
            parts.append(_Part(looks_around=piece.endswith(("=", "!"))))
        elif piece == ")":
            parts.pop()
            parts[-1].end()
            if not (part.alternatives or part.looks_around or optional):
                parts[-1].texts += [*part.texts, ""]
        elif piece == "|":
            part.alternatives = True
        elif optional or _NO_TEXT.fullmatch(piece) or (len(piece) <= 2 and piece[0] in "?*+") or piece.startswith("{"):
            part.end()
        else:
            part.texts[-1] += piece[-1]
    whole = parts[0]
    return "" if whole.alternatives else max(whole.texts, key=len)
