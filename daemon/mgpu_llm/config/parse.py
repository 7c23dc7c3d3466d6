"""From files to `Config`, or to everything that is wrong with them at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mgpu_llm.config import credentials, files, spelling
from mgpu_llm.config.document import Document, Place, merge, origin, replaced, value_at, without
from mgpu_llm.config.fields import Expected
from mgpu_llm.config.files import Source
from mgpu_llm.config.problem import ConfigProblem, dotted, in_order, is_secret, shown, toml
from mgpu_llm.config.schema import Config, RungSettings, Table, table_of, tables


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A config and what is wrong with it. Only one without problems may be acted upon.

    Keys with problems have their defaults in `config`, so that the rest can still be checked against the host.
    `complete` is false where a file could not be read: then nobody knows what the config says.
    """

    main: Path
    config: Config
    document: Document
    problems: tuple[ConfigProblem, ...] = ()
    complete: bool = True

    def problem(self, place: Place, found: str, *, expected: str = "", hint: str = "") -> ConfigProblem:
        """A problem with the value at a place, under the file that set it (the main one for a default)."""
        file = origin(self.document, place) or self.main
        return ConfigProblem(file=file, key=dotted(place), found=found, expected=expected, hint=hint)

    def faulty(self, table: str) -> bool:
        """Whether what seems wrong with a table may be the mere consequence of a problem already known: one of its
        own, or a table of an unknown name that this one was meant by."""
        astray = any(problem.key == problem.table for problem in self.problems)
        return (astray and table not in self.document.values) or any(
            problem.table == table for problem in self.problems
        )


def load(main: Path = files.DEFAULT_PATH) -> Loaded:
    """Read and parse the main file, its drop-ins and the credentials that systemd gave. Never raises for anything in them."""
    sources, problems = files.read(main)
    secrets, trouble = credentials.read(os.environ)
    return parse((*files.defaults(main), *sources, *secrets), main, (*problems, *trouble))


def parse(sources: Iterable[Source], main: Path, unread: tuple[ConfigProblem, ...] = ()) -> Loaded:
    """Parse texts that were read; `unread` are the problems of those that could not be."""
    document, broken = merge(sources)
    complete = not unread and not broken
    loaded = Loaded(main=main, config=Config(), document=document, complete=complete)
    problems, values = dict[Place, ConfigProblem](), document.values
    while errors := _errors(values):
        places = [_place(detail, values) for detail in errors]
        for place, detail in zip(places, errors, strict=True):
            problems.setdefault(place, _problem(loaded, detail, place))
        values = without(values, places)
    everything = in_order((*unread, *broken, *problems.values()))
    return replace(loaded, config=Config.model_validate(values), problems=everything)


def _errors(values: Mapping[str, Any]) -> list[ErrorDetails]:
    try:
        Config.model_validate(values)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _place(detail: ErrorDetails, values: Mapping[str, Any]) -> Place:
    """Where in the document it is. pydantic's own locations go on into branches of unions that no operator wrote."""
    place, _ = value_at(values, detail["loc"])
    if detail["type"] == "missing":
        return (*place, detail["loc"][-1])
    culprit = detail["ctx"]["key"] if detail["type"] == "rule" else ""
    return (*place, culprit) if culprit else place


def _problem(loaded: Loaded, detail: ErrorDetails, place: Place) -> ConfigProblem:
    values = loaded.document.values
    if detail["type"] == "extra_forbidden":
        known = f"one of {', '.join(spelling.known_keys(place))}"
        return loaded.problem(place, "an unknown key", expected=known, hint=spelling.did_you_mean(place))
    rule = detail["ctx"] if detail["type"] == "rule" else {}
    if rule.get("sentence"):
        return loaded.problem(place, rule["sentence"], hint=rule["hint"])
    expected = rule.get("expected") or _expected(place)
    there, value = value_at(values, place)
    if there != place:
        return loaded.problem(place, _absent(place), expected=expected)
    near = _near(values, place)
    hint = rule.get("hint") or ("" if is_secret(value, near) else _rewrite(values, place, value))
    return loaded.problem(place, shown(value, near=near), expected=expected, hint=hint)


def _expected(place: Place) -> str:
    """What belongs at a place, from the schema."""
    table: type[Table] | None = Config
    expected, text = Expected("a table"), "a table"
    for part in place:
        field = table.model_fields.get(str(part)) if table is not None else None
        if field is None:
            text, table = expected.item, RungSettings if expected.item == "a table" else None
            continue
        expected = next((known for known in field.metadata if isinstance(known, Expected)), Expected("a table"))
        text, table = expected.text, tables().get(str(part)) if expected.text == "a table" else None
    return text


def _absent(place: Place) -> str:
    """What is found where nothing was written: the default, unless the key has none."""
    field = table_of(place).model_fields[str(place[-1])]
    return "nothing" if field.is_required() else f"the default {toml(field.default)}"


def _near(values: Mapping[str, Any], place: Place) -> str:
    """The key, and before an element of an array the one before it: "--api-key" says what follows."""
    last = place[-1]
    before = value_at(values, (*place[:-1], last - 1))[1] if isinstance(last, int) and last else ""
    return f"{before} {dotted(place)}" if not isinstance(last, int) else f"{dotted(place[:-1])} {before}"


def _rewrite(values: Mapping[str, Any], place: Place, value: object) -> str:
    """How to write it instead, if another way of writing the same fits."""
    if place == ("ladder",) and isinstance(value, tuple):
        return "write [[ladder.rungs]]" if value else "write ladder.rungs = []"
    if place == ("ladder", "rungs") and isinstance(value, Mapping):
        return "write [[ladder.rungs]]"
    if len(place) == 1:
        return f"write [{place[0]}]"
    for candidate in spelling.rewrites(value):
        errors = _errors(replaced(values, place, candidate))
        if toml(candidate) != toml(value) and not any(
            _place(detail, values)[: len(place)] == place for detail in errors
        ):
            return f"write {toml(candidate)}"
    return ""
