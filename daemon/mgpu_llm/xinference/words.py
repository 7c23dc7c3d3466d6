"""The words of a command as people paste it: prompts, continued lines, quotes, assignments, sudo, redirections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

#: Blanks that come along with text from web pages and chats.
_BLANKS: Final = " \t\r\n\u00a0\u3000\u200b"
_OPERATORS: Final = frozenset(";&|<>")
_PROMPT: Final = re.compile(r"^\s*(?:\([\w.-]+\) )?(?:>|[^\s=]*[$#%❯]|\[[^\]=]*\][$#])\s+")
_CONTINUED: Final = re.compile(r"\\[ \t]*\n(?:> )?")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
#: Words of which nothing is lost: they say how the shell starts a command, and systemd starts ours.
_STARTERS: Final = frozenset(("sudo", "env", "nohup", "time", "exec", "export", "set", "setsid", "$", "#", "%", ">"))


class NotALaunchError(ValueError):
    """The text is no `xinference launch`; the message says what it is instead, and never quotes values."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """An `xinference launch`: the words behind it, the assignments before it, and what else stood around it.

    `program` is how xinference was called. `around` are the programs of other commands, none of which is carried over.
    """

    program: str
    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    around: tuple[str, ...] = ()


def find_launch(parts: Sequence[str]) -> Launch:
    """The launch in one text, or in words that a shell has taken apart already. Raises NotALaunchError."""
    if any("\ud800" <= char <= "\udfff" for part in parts for char in part):
        raise NotALaunchError("it is not UTF-8")
    words = _split(parts[0]) if len(parts) == 1 else list(parts)
    at = _launch_at(words)
    if at is None:
        raise NotALaunchError(_instead(words))
    env, around = _before(words[:at])
    own, behind = _own(words[at + 2 :])
    return Launch(program=words[at], words=own, env=env, around=(*around, *behind))


def _split(text: str) -> list[str]:
    """As a shell would. Raises NotALaunchError."""
    text = text.replace("\r\n", "\n")
    text = _PROMPT.sub("", _CONTINUED.sub("", text), count=1).rstrip(f"{_BLANKS}\\")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="".join(sorted(_OPERATORS)))
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = _BLANKS, True, ""
    try:
        return list(lexer)
    except ValueError as error:
        raise NotALaunchError(f"{error}".lower()) from error


def _launch_at(words: Sequence[str]) -> int | None:
    """Where "xinference launch" begins: "docker exec xinference xinference launch" has the name twice."""
    return next(
        (at for at, word in enumerate(words) if _is_program(word) and words[at + 1 : at + 2] == ["launch"]), None
    )


def _is_program(word: str) -> bool:
    return word == "xinference" or word.endswith("/xinference")


def _instead(words: Sequence[str]) -> str:
    wanted = "only `xinference launch` becomes a config"
    for at, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name.startswith("xinference-"):
            return f"{name!r} starts a server of Xinference's; {wanted}"
        if _is_program(word):
            verb = next((other for other in words[at + 1 :] if re.fullmatch(r"[a-z][a-z-]*", other)), "")
            return f"'xinference {verb}' loads no model; {wanted}" if verb else f"it has no verb; {wanted}"
    return f"there is no `xinference` in it; {wanted}"


def _before(words: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The assignments before a command, and the programs of other commands there."""
    env, around = dict[str, str](), list[str]()
    begins, skips = True, False
    for word in words:
        if match := _ASSIGNMENT.fullmatch(word):
            env[match[1]] = match[2]
        elif _is_operator(word):
            begins, skips = True, False
        elif begins and word in _STARTERS:
            skips = True
        elif begins and not (skips and word.startswith("-")):
            around.append(word)
            begins = False
    return env, tuple(around)


def _own(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The launch's own words, and the programs behind it; a redirection is neither."""
    end = next((at for at, word in enumerate(words) if _is_operator(word)), len(words))
    own, behind = list(words[:end]), words[end:]
    if behind and behind[0][0] in "<>" and own[-1:] in (["1"], ["2"]) and not "".join(own[-2:-1]).startswith("-"):
        own = own[:-1]  # of 2>&1; "--replica 2 >log" keeps its 2
    programs = [word for before, word in pairwise(behind) if before[0] in ";|&" and not _is_operator(word)]
    return tuple(own), tuple(word for word in programs if not _ASSIGNMENT.fullmatch(word))


def _is_operator(word: str) -> bool:
    return bool(word) and _OPERATORS.issuperset(word)
