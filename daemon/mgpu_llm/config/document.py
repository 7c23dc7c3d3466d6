"""The files' TOML as one document that remembers which file said what."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgpu_llm.config.files import Source
from mgpu_llm.config.problem import ConfigProblem

#: A key's place: table, key, and further in, elements of arrays by index.
Place = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """`values` holds plain tables and tuples. `origins` has the file of each place that is not a table."""

    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[Place, Path] = field(default_factory=dict)


def merge(sources: Iterable[Source]) -> tuple[Document, tuple[ConfigProblem, ...]]:
    """Lay the files over each other: tables merge, anything else replaces. Files that are not TOML become problems."""
    values, origins, problems = dict[str, Any](), dict[Place, Path](), list[ConfigProblem]()
    for source in sources:
        try:
            # A line end behind the last line: tomllib then names the line of a mistake there, too.
            table = tomllib.loads(f"{source.text}\n")
        except (ValueError, RecursionError) as error:  # also of a number or a nesting without end
            problems.append(ConfigProblem(file=source.file, key="", found=f"cannot read it as TOML: {_lower(error)}"))
            continue
        _lay_over(values, _frozen(table), (), source.file, origins)
    return Document(values=values, origins=origins), tuple(problems)


def origin(document: Document, place: Place) -> Path | None:
    """The file that said it: itself, what it is part of, or for a table the file of something in it."""
    for length in range(len(place), 0, -1):
        if (file := document.origins.get(place[:length])) is not None:
            return file
    return next((file for other, file in document.origins.items() if place and other[: len(place)] == place), None)


def value_at(values: Any, place: Place) -> tuple[Place, Any]:
    """How far a place exists in the values, and what is there."""
    for depth, part in enumerate(place):
        inside = isinstance(values, Mapping) and part in values
        inside = inside or (isinstance(values, tuple) and isinstance(part, int) and part < len(values))
        if not inside:
            return place[:depth], values
        values = values[part]
    return place, values


def replaced(values: Any, place: Place, new: object) -> Any:
    """The values with another one at an existing place."""
    if not place:
        return new
    first, rest = place[0], place[1:]
    if isinstance(values, tuple):
        return tuple(replaced(item, rest, new) if index == first else item for index, item in enumerate(values))
    return {key: replaced(item, rest, new) if key == first else item for key, item in values.items()}


def without(values: Mapping[str, Any], places: Iterable[Place]) -> Mapping[str, Any]:
    """The values less the keys of tables in which the places lie, or less a whole table where it has no such key."""
    less = {table: dict(inner) if isinstance(inner, Mapping) else inner for table, inner in values.items()}
    for place in places:
        table, inner = str(place[0]), values[str(place[0])]
        if len(place) == 1 or not isinstance(inner, Mapping) or place[1] not in inner:
            less.pop(table, None)
        else:
            less.get(table, {}).pop(place[1], None)
    return less


def _lay_over(
    below: dict[str, Any], above: Mapping[str, Any], place: Place, file: Path, origins: dict[Place, Path]
) -> None:
    for key, value in above.items():
        here = (*place, key)
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _lay_over(below[key], value, here, file, origins)
            continue
        for old in [other for other in origins if other[: len(here)] == here]:
            del origins[old]
        if isinstance(value, Mapping):
            below[key] = {}
            origins.update({here: file} if not value else {})
            _lay_over(below[key], value, here, file, origins)
        else:
            below[key] = value
            origins[here] = file


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return (
        tuple(_frozen(item) for item in value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    )


def _lower(error: Exception) -> str:
    text = str(error)
    return text[:1].lower() + text[1:]
