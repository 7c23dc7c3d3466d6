"""Which changes of a config hold at once, and which wait for the next start of the daemon."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Final

from mgpu_llm.config.ladder import areas
from mgpu_llm.config.schema import Config
from mgpu_llm.core.remedies import Area

#: Tables of which every key can change while the daemon runs, and such keys of other tables.
LIVE_TABLES: Final = frozenset({"patience", "heartbeat", "serving", "retries"})
LIVE_KEYS: Final = frozenset({"stop.grace", "daemon.log_level", "ladder.retry_up_after"})
#: These two say together which areas may change.
AREA_KEYS: Final = frozenset({"ladder.may_change", "ladder.pin"})


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a reload makes of a config. `config` is what holds from now on: what waits for a restart is in it as it was. The
    others are keys such as "patience.weights", in the order of the schema."""

    config: Config
    applied: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


def change(running: Config, wanted: Config, in_use: Set[Area] = frozenset()) -> Change:
    """From the config that holds to the one that is wanted. `in_use` are the areas that the settings now in use have changed."""
    live = LIVE_TABLES | LIVE_KEYS | (AREA_KEYS if _areas_can_change(running, wanted, in_use) else frozenset())
    tables, applied, waiting = dict[str, Any](), list[str](), list[str]()
    for table, key in _changed(running, wanted):
        name = f"{table}.{key}"
        if name in live or table in live:
            applied.append(name)
            values = getattr(wanted, table)
            tables[table] = tables.get(table, getattr(running, table)).model_copy(update={key: getattr(values, key)})
        else:
            waiting.append(name)
    return Change(config=running.model_copy(update=tables), applied=tuple(applied), needs_restart=tuple(waiting))


def _changed(running: Config, wanted: Config) -> Iterator[tuple[str, str]]:
    for table in Config.model_fields:
        before, after = getattr(running, table), getattr(wanted, table)
        for key in type(before).model_fields:
            if getattr(before, key) != getattr(after, key):
                yield table, key


def _areas_can_change(running: Config, wanted: Config, in_use: Set[Area]) -> bool:
    """Not where the settings in use would be forbidden, and not where the context length is concerned: by that it was reckoned
    on how few GPUs the model fits."""
    before, after = areas(running), areas(wanted)
    return in_use <= after and Area.CONTEXT_LENGTH not in before ^ after
