"""What is wrong with the config, in the words of the file that the operator wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Final

#: Keys and arguments whose values stay out of messages: these go to journals that many people read.
_SECRET: Final = re.compile(r"api[-_]?key|secret|password|passwd|token(=|$)", re.IGNORECASE)
_LONGEST: Final = 72


@dataclass(frozen=True, kw_only=True)
class ConfigProblem:
    """One thing to put right. `key` is dotted ("engine.port"), empty when the file as a whole is meant.

    With an empty `expected`, `found` is a whole sentence.
    """

    file: Path
    key: str
    found: str
    expected: str = ""
    hint: str = ""

    @property
    def table(self) -> str:
        """The top of the key: "gpus" of gpus.use, "ladder" of ladder.rungs[0].name."""
        return re.split(r"[.\[]", self.key)[0]


def render(problems: Iterable[ConfigProblem]) -> str:
    """One line a problem, by file and key, without a line end after the last; "" for none."""
    return "\n".join(_line(problem) for problem in in_order(problems))


def in_order(problems: Iterable[ConfigProblem]) -> tuple[ConfigProblem, ...]:
    return tuple(sorted(problems, key=lambda problem: (str(problem.file), problem.key, problem.found)))


def _line(problem: ConfigProblem) -> str:
    place = f"{problem.file}: {problem.key}" if problem.key else f"{problem.file}"
    what = f"found {problem.found}, expected {problem.expected}" if problem.expected else problem.found
    return f"{place}: {what}" + (f"; {problem.hint}" if problem.hint else "")


def dotted(path: Sequence[str | int]) -> str:
    """The path of a key as TOML writes it, with array elements by index: engine.args[2]."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[\w-]+", part, re.ASCII) else quoted(part))
    return text


def shown(value: object, *, near: str = "") -> str:
    """A value and its type in TOML's words. `near` is what stands around it: a secret's name there hides the value."""
    if is_secret(value, near):
        return f"{_kind(value)} (hidden)"
    if isinstance(value, Mapping):
        return "a table"
    text = toml(value)
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{short} ({_kind(value).split(maxsplit=1)[1]})"


def is_secret(value: object, near: str) -> bool:
    return _SECRET.search(near) is not None or _SECRET.search(f"{value}") is not None


def toml(value: object) -> str:
    """A value as one would write it in the file."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return quoted(value)
        case list() | tuple():
            return f"[{', '.join(toml(item) for item in value)}]"
        case Mapping():
            return "{...}"
        case _:
            return str(value)


def quoted(text: str) -> str:
    """In double quotes, with everything escaped that would leave the line or the quotes."""
    escaped = (char if char.isprintable() else f"\\u{ord(char):04x}" for char in re.sub(r'(["\\])', r"\\\1", text))
    return f'"{"".join(escaped)}"'


def _kind(value: object) -> str:
    match value:
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a float"
        case str():
            return "a string"
        case list() | tuple():
            return "an array"
        case date() | datetime() | time():
            return "a date or time"
        case _:
            return "a table"
