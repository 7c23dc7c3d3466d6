"""The rung that served last: where the next start begins, for as long as nothing that it depends on has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from mgpu_llm.core.ladder import BASE, Ladder, Rung

FORMAT: Final = 1
_LONGEST_TEXT: Final = 2000


@dataclass(frozen=True, kw_only=True)
class KnownGood:
    """A rung other than the base, by name, that came to service at the UTC time `since` ("2026-11-24T21:05:00Z") and has
    served in every start from then on.

    `cause` names why the base did not serve, one cause or several. `key` is what the rung depends on, each part by its name.
    `starts` counts the planned starts since a more capable rung was last tried, and `boot` is the boot in which that was.
    """

    rung: str
    since: str
    cause: str
    key: Mapping[str, str] = field(default_factory=dict)
    starts: int = 0
    boot: str = ""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """On which rung a planned start begins. `trial`: one that is more capable than what served last, to see whether that can be
    had again, and `why` now; `known` is what is remembered from then on."""

    rung: Rung
    known: KnownGood | None
    trial: bool = False
    why: str = ""


def begin(known: KnownGood | None, ladder: Ladder, *, boot: str, up_after: int) -> Beginning:
    """The base where nothing is known. Else the rung that served last; and once in `up_after` planned starts (0: never), and
    after a reboot, the rung above it."""
    if known is None:
        return Beginning(rung=BASE, known=None)
    try:
        rung = ladder.rung(known.rung)
    except ValueError:
        return Beginning(rung=BASE, known=None)
    booted = boot != known.boot and bool(boot)
    if up_after and (booted or known.starts + 1 >= up_after):
        why = "the host was booted" if booted else f"after {known.starts} planned starts"
        above = Rung(remedies=rung.remedies[:-1])
        return Beginning(rung=above, known=replace(known, starts=0, boot=boot), trial=True, why=why)
    return Beginning(rung=rung, known=replace(known, starts=known.starts + 1))


def served(
    known: KnownGood | None, rung: Rung, *, causes: Sequence[str], key: Mapping[str, str], utc_s: float, boot: str
) -> KnownGood | None:
    """What to remember now that `rung` serves, to which `causes` have led: nothing of the base, and the first date."""
    if rung == BASE:
        return None
    if known is not None and known.rung == rung.name:
        # What nobody can tell today is still what it was.
        return replace(known, key={**known.key, **{name: part for name, part in key.items() if part}})
    before = known.cause.split(", ") if known is not None else []
    cause = ", ".join(cause for cause in dict.fromkeys([*before, *causes]) if cause)
    return KnownGood(rung=rung.name, since=utc_text(utc_s), cause=cause[:_LONGEST_TEXT], key=key, boot=boot)


def utc_text(utc_s: float) -> str:
    """Seconds since 1970 as "2026-11-24T21:05:00Z"."""
    return datetime.fromtimestamp(utc_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def changes(known: KnownGood, key: Mapping[str, str]) -> tuple[str, ...]:
    """What is no longer as it was when the rung served, in words. A part that cannot be told today has not changed."""
    parts = ((name, known.key.get(name, ""), value) for name, value in key.items())
    return tuple(f"{name} {_short(old)} -> {_short(new)}" for name, old, new in parts if old and new and old != new)


def to_json(known: KnownGood) -> str:
    return json.dumps({"format": FORMAT, **asdict(known), "key": dict(known.key)}, indent=1) + "\n"


def from_json(text: str) -> KnownGood:
    """The inverse of `to_json`. Raises ValueError, whose text says in one line what is wrong."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    key, starts = found.get("key"), found.get("starts")
    if not isinstance(key, dict) or not all(isinstance(part, str) for part in key.values()):
        raise ValueError('it has no texts "key"')
    if not isinstance(starts, int) or isinstance(starts, bool) or not 0 <= starts <= 1_000_000:
        raise ValueError('it has no number "starts"')
    texts = {name: _text(found, name) for name in ("rung", "since", "cause", "boot")}
    return KnownGood(**texts, key={str(name): str(part)[:_LONGEST_TEXT] for name, part in key.items()}, starts=starts)


def _text(found: Mapping[str, Any], name: str) -> str:
    text = found.get(name)
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT or not text.isprintable():
        raise ValueError(f'it has no text "{name}"')
    return text


def _short(part: str) -> str:
    return part if len(part) <= 60 else f"{part[:57]}..."
