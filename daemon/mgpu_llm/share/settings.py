"""The page of the config: each table and key, with its bounds, its default, and what the shipped file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from mgpu_llm.config.descriptions import SHIPPED, descriptions
from mgpu_llm.config.fields import Expected
from mgpu_llm.config.problem import toml
from mgpu_llm.config.schema import Table, tables
from mgpu_llm.share.roff import Page


def page(version: str) -> Page:
    """Raises OSError where the shipped file cannot be read."""
    told = descriptions(SHIPPED.read_text("utf-8"))
    made = Page(SHIPPED.name, 5, version, "settings of mgpu-llm")
    made.section("SYNOPSIS")
    made.as_it_is(["/etc/mgpu-llm/mgpu-llm.toml", "/etc/mgpu-llm/conf.d/*.toml"])
    made.as_it_is(["/etc/mgpu-llm/NAME.toml", "/etc/mgpu-llm/NAME.d/*.toml"])
    made.section("DESCRIPTION")
    made.text(told[""])
    for name, table in tables().items():
        made.section(f"[[{name}]]" if "." in name else f"[{name}]")
        made.text(told[name])
        _keys(made, name, table, {**told, "ladder.rungs": "See below."})
    return made


def _keys(made: Page, name: str, table: type[Table], told: Mapping[str, str]) -> None:
    """Keys of which the same is said stand together."""
    for text, keys in groupby(table.model_fields, lambda key: told.get(f"{name}.{key}", "")):
        heads = [_head(table, key) for key in keys]
        made.entry(heads, text or told[name])


def _head(table: type[Table], key: str) -> str:
    """The key with its default, and what it may be."""
    field = table.model_fields[key]
    may = next(known.text for known in field.metadata if isinstance(known, Expected))
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return f"{key} ({may})" if default is None else f"{key} = {toml(default) if default != {} else '{}'} ({may})"
