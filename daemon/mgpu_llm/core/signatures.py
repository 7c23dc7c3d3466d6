"""The table of what a failure looks like, signatures.toml beside this module: how it is read, and what a line matches.

A row is told by what the engine or the kernel says (`patterns`), or by what is seen of a stall (`stall`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from string import Formatter
from typing import Any, Final, TypeVar

from mgpu_llm.core import anchors
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.remedies import Want

E = TypeVar("E", bound=StrEnum)
#: So much of a line is searched: longer ones are data that somebody printed, and take long.
SEARCHED: Final = 4000
#: What the sentences of a stall's row may name.
STALL_WORDS: Final = frozenset({"quiet", "spins", "stopped", "lock_waits", "storage_waits", "thrashing"})


class Kind(StrEnum):
    """How it shows: nothing moves any more, the engine ends, all is well but slow, or nothing shows until later."""

    HANG = "hang"
    CRASH = "crash"
    SLOW = "slow-but-healthy"
    LATENT = "latent"


class Role(StrEnum):
    """What a line that matches is worth: a root is a cause. A cascade says that something failed elsewhere; it is the cause where
    no root was named, if it wants anything at all. A teardown is only the noise of the end."""

    ROOT = "root"
    CASCADE = "cascade"
    TEARDOWN = "teardown"


class Where(StrEnum):
    """In what a pattern is looked for: the engine's errors, any line of the engine, the kernel's log, how the engine ended, or
    what a preflight says."""

    ERROR = "error"
    ANY = "any"
    KERNEL = "kernel"
    EXIT = "exit"
    PREFLIGHT = "preflight"


class Group(StrEnum):
    TRANSPORT = "transport"
    PROCESS = "process"
    MEMORY = "memory"
    MODEL = "model"
    PLATFORM = "platform"
    SLOW = "slow"


class Gpus(StrEnum):
    """Two GPUs or more that all compute without getting anywhere, or that all do nothing."""

    SPIN = "spin"
    IDLE = "idle"


class SignatureError(ValueError):
    """The table cannot be read; says every row that is wrong, and how."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What must be seen of a stall; all that is given must hold. `blind`: no Python frames of any worker were seen. `frame` is
    any Python frame of any thread, `workers` one of the main thread of every worker, `waits_in` the kernel function in which
    any thread sleeps, `shows` what the stall itself names."""

    gpus: Gpus | None = None
    blind: bool | None = None
    spinning: bool | None = None
    gpu_memory_below_gb: float | None = None
    frame: re.Pattern[str] | None = None
    workers: re.Pattern[str] | None = None
    waits_in: re.Pattern[str] | None = None
    last_line: re.Pattern[str] | None = None
    shows: str = ""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One row. `reported_as` is the cause that people are told, mostly the row's own `id`; no `phases` means any. `anchors` are
    the texts without which the patterns need not be tried."""

    id: str
    reported_as: str
    atlas: tuple[str, ...]
    group: Group
    phases: frozenset[Phase]
    kind: Kind
    role: Role
    where: Where
    patterns: tuple[re.Pattern[str], ...]
    anchors: tuple[str, ...]
    stall: Rule | None
    cause: str
    advice: str
    wants: tuple[Want, ...]
    sources: tuple[str, ...]
    unless: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def match(self, message: str) -> re.Match[str] | None:
        """What the row matches in the line, if it does."""
        for text, pattern in zip(self.anchors, self.patterns, strict=True):
            if text in message and (match := pattern.search(message[:SEARCHED])) is not None:
                return match
        return None

    def holds_in(self, phase: Phase | None) -> bool:
        """Whether the row is about that phase; None is an engine that served."""
        return not self.phases or phase in self.phases


def parse(text: str) -> tuple[Signature, ...]:
    """Read the table. Raises SignatureError."""
    try:
        rows: list[dict[str, Any]] = tomllib.loads(text).get("signature", [])
    except tomllib.TOMLDecodeError as error:
        raise SignatureError(f"cannot read signatures: {error}") from error
    read, wrong, ids = list[Signature](), list[str](), set[str]()
    for number, row in enumerate(rows, start=1):
        try:
            read.append(_row(row, ids))
            ids.add(read[-1].id)
        except (ValueError, re.error) as error:
            wrong.append(f"row {number} ({row.get('id', 'without id')}): {error}")
    if wrong:
        raise SignatureError(f"cannot read signatures: {'; '.join(wrong)}")
    return tuple(read)


def load() -> tuple[Signature, ...]:
    """The table of this package."""
    return parse(resources.files(__package__).joinpath("signatures.toml").read_text(encoding="utf-8"))


def _row(row: dict[str, Any], ids: set[str]) -> Signature:
    left = dict(row)
    name = _text(left, "id")
    if name in ids:
        raise ValueError("id: there is a row of that name already")
    rule = _table(left, "stall")
    patterns = tuple(_pattern("patterns", text) for text in _texts(left, "patterns"))
    read = Signature(
        id=name,
        reported_as=_text(left, "reported_as", name),
        atlas=_texts(left, "atlas"),
        group=_one_of(Group, "group", _text(left, "group")),
        phases=frozenset(_phase(word) for word in _texts(left, "phases")),
        kind=_one_of(Kind, "kind", _text(left, "kind")),
        role=_one_of(Role, "role", _text(left, "role", Role.ROOT)),
        where=_one_of(Where, "where", _text(left, "where", Where.ERROR)),
        patterns=patterns,
        anchors=tuple(anchors.anchor(pattern.pattern) for pattern in patterns),
        stall=None if rule is None else _rule(rule),
        cause=_text(left, "cause"),
        advice=_text(left, "advice", ""),
        wants=tuple(_one_of(Want, "wants", word) for word in _texts(left, "wants")),
        sources=_texts(left, "sources"),
        unless=_texts(left, "unless"),
        versions=_texts(left, "versions"),
    )
    _nothing_left(left)
    _check(read, ids)
    return read


def _check(row: Signature, ids: set[str]) -> None:
    if bool(row.patterns) == (row.stall is not None):
        raise ValueError("it needs either patterns or a stall")
    if row.role is Role.ROOT and row.kind in (Kind.HANG, Kind.CRASH) and not (row.wants and row.advice):
        raise ValueError("a root needs advice, and wants")
    if unknown := sorted(set(row.unless) - ids):
        raise ValueError(f"unless: there is no row {', '.join(unknown)} above")
    if not row.sources:
        raise ValueError("sources: none is named")
    known = STALL_WORDS if row.stall is not None else set.intersection(*(set(p.groupindex) for p in row.patterns))
    named = {name for _, name, _, _ in Formatter().parse(row.cause) if name is not None}
    if unknown := sorted(named - known):
        raise ValueError(f"cause: nothing gives {', '.join(unknown)}")


def _rule(given: dict[str, Any]) -> Rule:
    gpus, below = given.pop("gpus", None), given.pop("gpu_memory_below_gb", None)
    blind, spinning = given.pop("blind", None), given.pop("spinning", None)
    shows = _text(given, "shows", "")
    if shows and shows not in ("stopped", "lock_waits", "storage_waits", "thrashing"):
        raise ValueError(f"stall.shows: {shows!r} is nothing that a stall shows")
    seen = {name: _text(given, name, "") for name in ("frame", "workers", "waits_in", "last_line")}
    _nothing_left(given)
    return Rule(
        gpus=None if gpus is None else _one_of(Gpus, "stall.gpus", gpus),
        blind=None if blind is None else bool(blind),
        spinning=None if spinning is None else bool(spinning),
        gpu_memory_below_gb=None if below is None else float(below),
        shows=shows,
        **{name: _pattern(f"stall.{name}", text) for name, text in seen.items() if text},
    )


def _nothing_left(given: Mapping[str, Any]) -> None:
    if given:
        raise ValueError(f"unknown key {', '.join(sorted(given))}")


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.pop(key, default)
    if not isinstance(value, str) or (default is None and not value):
        raise ValueError(f"{key}: a text is needed")
    return value


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.pop(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key}: a list of texts is needed")
    return tuple(value)


def _table(row: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = row.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key}: a table is needed")
    return None if value is None else dict(value)


def _one_of(kind: type[E], key: str, word: str) -> E:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{key}: {word!r} is none of {', '.join(kind)}") from None


def _phase(word: str) -> Phase:
    for phase in Phase:
        if phase.label == word:
            return phase
    raise ValueError(f"phases: {word!r} is none of {', '.join(phase.label for phase in Phase)}")


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key}: {text!r} is no pattern: {error}") from error
