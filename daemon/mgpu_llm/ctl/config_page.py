"""The config's effective values as TOML, with a comment behind each that says where it is from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mgpu_llm.ctl.words import cells, filled, plain

#: Beyond it a comment stands where the value ends, for one long value is not to move all the others'.
WIDEST = 48


def config_lines(document: Mapping[str, Any]) -> list[str]:
    """The lines of what `mgpud --show-config` printed. Raises LookupError, TypeError and ValueError for anything else."""
    head = f"# {plain(str(document['config']))}"
    instance = str(document["instance"])
    lines = [f"{head}, instance {instance}" if instance else head]
    tables = dict[str, list[tuple[str, str]]]()
    for setting in document["settings"]:
        key, value = str(setting["key"]), setting["value"]
        # A variable's name has no dots; those of keys and tables have none either.
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append((_setting(name, value), _origin(setting)))
    for table, rows in tables.items():
        width = min(max(cells(text) for text, _ in rows), WIDEST)
        lines += ["", f"[{plain(table)}]", *(f"{filled(text, width)}  # {origin}" for text, origin in rows)]
    return lines


def _setting(name: str, value: Any) -> str:
    if value is None:  # of ladder.rungs, which TOML cannot say
        return f"# {plain(name)}: what is built in"
    return f"{plain(name)} = {_toml(value)}"


def _origin(setting: Mapping[str, Any]) -> str:
    if setting["file"] is not None:
        return plain(str(setting["file"]))
    return {"instance": "the instance's name", "default": "default"}[setting["origin"]]


def _toml(value: Any) -> str:
    """JSON's numbers, booleans and strings are TOML's, too."""
    match value:
        case list():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case dict():
            pairs = (f"{_name(key)} = {_toml(item)}" for key, item in value.items())
            return f"{{ {', '.join(pairs)} }}" if value else "{}"
        case str():
            return plain(json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f"))
        case bool() | int() | float():
            return json.dumps(value)
        case _:
            raise TypeError(f"no value of a config: {value!r}")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml(key)
