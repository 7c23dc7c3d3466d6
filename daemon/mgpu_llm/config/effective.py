"""The values that a config comes to, and where each is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mgpu_llm.config import files, parse
from mgpu_llm.config.document import Place, merge, origin
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import dotted, render
from mgpu_llm.config.schema import Config, EngineSettings, RungSettings
from mgpu_llm.core import redaction
from mgpu_llm.core.redaction import Redactor


class Origin(StrEnum):
    """Who said it: mgpu-llm itself, the name of the instance, or a file."""

    DEFAULT = "default"
    INSTANCE = "instance"
    FILE = "file"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value, without secrets, as JSON has it; `file` is None where no file said it. `key` is as TOML writes it:
    "gpus.use", and for each variable "engine.env.NAME". None as the `value` of ladder.rungs is the built-in ladder."""

    key: str
    value: Any
    origin: Origin
    file: Path | None = None


def effective(main: Path) -> tuple[Loaded, tuple[Setting, ...]]:
    """The config, and every setting of it in the order of the shipped file; those with problems have their defaults."""
    sources, unread = files.read(main)
    loaded = parse.parse((*files.defaults(main), *sources), main, unread)
    written, _ = merge(sources)
    found = list[Setting]()
    for place, value in _settings(loaded):
        table, key = str(place[0]), str(place[1])
        said = key in getattr(loaded.config, table).model_fields_set
        file = origin(written, place) if said else None
        who = Origin.FILE if file else Origin.INSTANCE if said else Origin.DEFAULT
        found.append(Setting(key=dotted(place), value=value, origin=who, file=file))
    return loaded, tuple(found)


def document(main: Path) -> dict[str, Any]:
    """The same for JSON: "config", "instance" ("" for the usual one), "problems" as lines, and "settings"."""
    loaded, settings = effective(main)
    return {
        "config": str(main),
        "instance": files.instance(main),
        "problems": render(loaded.problems).splitlines(),
        "settings": [
            {
                "key": setting.key,
                "value": setting.value,
                "origin": setting.origin.value,
                "file": None if setting.file is None else str(setting.file),
            }
            for setting in settings
        ],
    }


def _settings(loaded: Loaded) -> Iterator[tuple[Place, Any]]:
    """Places and values without secrets. Each variable is one: another file may have said it."""
    config = loaded.config
    holders: tuple[EngineSettings | RungSettings, ...] = (config.engine, *(config.ladder.rungs or ()))
    hide = Redactor(secret for holder in holders for secret in redaction.secrets_of(holder.env, holder.args))
    for table in Config.model_fields:
        for key, value in getattr(config, table):
            if isinstance(value, Mapping) and value:
                for name, held in redaction.environment(value).items():
                    yield (table, key, name), hide.text(held)
            else:
                yield (table, key), hide.tree(_plain(value))


def _plain(value: Any) -> Any:
    """As JSON has it. Command lines lose what follows a secret option, and a rung has what was written of it."""
    match value:
        case RungSettings():
            return {
                key: _plain(getattr(value, key)) for key in RungSettings.model_fields if key in value.model_fields_set
            }
        case tuple() if value and all(isinstance(item, str) for item in value):
            return redaction.argv(value)
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value
