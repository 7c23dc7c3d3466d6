"""The config as a JSON Schema (draft 2020-12), by which editors complete it and mark what is wrong.

It refuses what one value by itself shows to be wrong. What two keys have to do with each other, and the host, is left to
`mgpud --check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mgpu_llm.config.descriptions import SHIPPED, descriptions
from mgpu_llm.config.schema import Config, tables

DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema; raises OSError where the shipped file, which describes the keys, cannot be read."""
    told = descriptions(SHIPPED.read_text("utf-8"))
    made = {name: table.model_json_schema() for name, table in tables().items() if name in Config.model_fields}
    found = {name: _whole(table, table.pop("$defs", {})) for name, table in made.items()}
    whole = {"type": "object", "properties": found, "additionalProperties": False}
    _describe(whole, "", told)
    return {"$schema": DRAFT, "title": SHIPPED.name, "description": told[""], **whole}


def _whole(node: Any, definitions: Mapping[str, Any]) -> Any:
    """With what is referred to in its place, and without what TOML does not have or an operator need not read: null, pydantic's
    titles and our docstrings."""
    if isinstance(node, list):
        return [_whole(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if reference := node.get("$ref"):
        node = {**node, **definitions[reference.rpartition("/")[2]]}
    told = {key: _whole(held, definitions) for key, held in node.items() if key not in ("$ref", "title", "description")}
    kinds = [kind for kind in told.pop("anyOf", []) if kind != {"type": "null"}]
    if told.get("default", "") is None:
        del told["default"]
    return {**told, **kinds[0]} if len(kinds) == 1 else {**told, "anyOf": kinds} if kinds else told


def _describe(table: dict[str, Any], name: str, told: Mapping[str, str]) -> None:
    """Each key gets what is said of it, or of its table."""
    for key, node in table["properties"].items():
        place = f"{name}.{key}" if name else key
        node["description"] = told.get(place) or told[name]
        for inner in (node, node.get("items", {})):
            if "properties" in inner:
                _describe(inner, place, told)
