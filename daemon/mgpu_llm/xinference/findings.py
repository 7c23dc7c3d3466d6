"""What was found out about a command: settings to write, and what is to be said beside them."""

from __future__ import annotations

from dataclasses import dataclass

Value = str | int | float | tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of the config. `why` has the lines of its comment, where it came from first."""

    table: str
    name: str
    value: Value
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An option of vLLM and its values, for engine.args."""

    words: tuple[str, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable for [engine.env]."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Same:
    """Asked for, and so by default here."""

    what: str


@dataclass(frozen=True, kw_only=True)
class Secret:
    """Asked for, and never written down. `name` is the variable that vLLM reads it from, "" where there is none."""

    what: str
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Left:
    """Asked for, and not carried over."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Remark:
    """What an admin should know about what was carried over."""

    about: str
    text: str


Finding = Key | Argument | Variable | Same | Secret | Left | Remark
