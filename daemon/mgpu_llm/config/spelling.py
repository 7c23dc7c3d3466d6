"""Guesses at what an operator meant, each tried before it is offered."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Final

from mgpu_llm.config.document import Place
from mgpu_llm.config.problem import dotted
from mgpu_llm.config.schema import RungSettings, table_of, tables
from mgpu_llm.core.remedies import Area

_WORDS: Final = ("all", "none", "auto", "debug", "info", "warning", "error", *Area)
_SWITCHES: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
#: Tables in which people look for vLLM's own options.
_ABOUT_THE_ENGINE: Final = frozenset({"model", "engine", "gpus"})


def known_keys(place: Place) -> Sequence[str]:
    """The keys that may stand where this one does."""
    return tuple(table_of(place).model_fields)


def did_you_mean(place: Place) -> str:
    """A hint for an unknown key, "" when nothing comes to mind."""
    unknown = str(place[-1]).lower().replace("-", "_")
    if place[0] == "ladder" and len(place) == 2 and unknown in RungSettings.model_fields:
        return "rungs are written as [[ladder.rungs]]"
    everywhere = [
        (name, key) for name, table in tables().items() for key in table.model_fields if name != "ladder.rungs"
    ]
    if same := [name for name, key in everywhere if key == unknown]:
        near = place[0] if place[0] in same else same[0]
        return f"did you mean {near}.{unknown}?"
    if close := get_close_matches(unknown, known_keys(place), 1, 0.6):
        return f"did you mean {dotted((*place[:-1], close[0]))}?"
    if close := get_close_matches(unknown, [key for _, key in everywhere], 1, 0.75):
        return f"did you mean {next(name for name, key in everywhere if key == close[0])}.{close[0]}?"
    if str(place[-1]).isupper():
        return "variables of the engine go into [engine.env]"
    return "options of vLLM go into engine.args" if place[0] in _ABOUT_THE_ENGINE else ""


def rewrites(value: object) -> Iterator[object]:
    """Other ways to write a value, likeliest first. Most will not fit either: the caller tries them."""
    match value:
        case bool():
            yield "1" if value else "0"
        case str():
            yield from _rewritten_text(value)
        case int() | float():
            yield from (int(value),) if value == value // 1 else ()
            yield (value,)
            yield str(value)
            yield from (bool(value),) if value in (0, 1) else ()
            yield from (value / 100,) if 2 <= value <= 100 else ()
        case tuple():
            yield tuple(item if isinstance(item, str) else str(item) for item in value)
            yield tuple(_number(item) if isinstance(item, str) else item for item in value)
            yield from value if len(value) == 1 else ()
        case _:
            return


def _rewritten_text(text: str) -> Iterator[object]:
    if (number := _number(text)) is not None:
        yield number
        yield (number,)
    if text.rstrip().endswith("%") and (percent := _number(text.rstrip()[:-1])) is not None:
        yield percent / 100
    numbers = [_number(part) for part in text.strip(" []").split(",")]
    yield tuple(numbers)
    yield tuple(part.strip(" \"'") for part in text.strip(" []").split(","))
    yield text.strip()
    yield from (_SWITCHES[word],) if (word := text.strip().lower()) in _SWITCHES else ()
    yield from get_close_matches(text.strip().lower(), _WORDS, 1, 0.7)
    try:
        yield tuple(shlex.split(text))
    except ValueError:
        return


def _number(text: str) -> int | float | None:
    """The number in a text, with or without a unit of seconds behind it."""
    if found := re.fullmatch(r"\s*(-?\d+(\.\d+)?)\s*(s|sec|seconds)?\s*", text, re.ASCII):
        return float(found[1]) if found[2] else int(found[1])
    return None
