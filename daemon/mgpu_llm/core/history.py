"""What this host's successful starts have needed, so that patience and estimates follow the host and not a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.launch import SECRET, shown

FORMAT: Final = 1
#: So many successful starts are remembered.
LONGEST: Final = 20
#: A time beyond is none: no start takes thirty years. JSON's integers may be too large for any float.
LONGEST_S: Final = 1e9


@dataclass(frozen=True, kw_only=True)
class PastStart:
    """One start that came to service, at the UTC time `at` ("2026-11-24T21:05:00Z").

    `launch` is its key (`launch_key`). `phase_s` has how long each phase took and `quiet_s` the longest quiet in it, by
    the phase's label; what was not seen is not there.
    """

    launch: str
    model: str
    at: str
    duration_s: float
    phase_s: Mapping[str, float]
    quiet_s: Mapping[str, float]


def launch_key(argv: Sequence[str], env: Mapping[str, str], uuids: Sequence[str]) -> str:
    """The same for starts that can be compared: command line, the launch's own variables and the GPUs. Secrets are not
    part of it: a new API key changes nothing, and the key is no way to guess one."""
    variables = sorted((name, "" if SECRET.fullmatch(name) else value) for name, value in env.items())
    text = json.dumps([shown(argv), variables, list(uuids)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_start(starts: Sequence[PastStart], start: PastStart) -> tuple[PastStart, ...]:
    """The history with one more, the newest last."""
    return (*starts, start)[-LONGEST:]


def longest_quiet(starts: Iterable[PastStart]) -> dict[Phase, float]:
    """The longest quiet that any of the starts survived, by phase; phases never seen are not there."""
    longest = dict[Phase, float]()
    for start in starts:
        for phase in Phase:
            if (quiet_s := start.quiet_s.get(phase.label)) is not None:
                longest[phase] = max(longest.get(phase, 0.0), quiet_s)
    return longest


def usual(starts: Sequence[PastStart], launch: str) -> PastStart | None:
    """The newest start of this launch."""
    return next((start for start in reversed(starts) if start.launch == launch), None)


def to_json(starts: Iterable[PastStart]) -> str:
    return json.dumps({"format": FORMAT, "starts": [_plain(start) for start in starts]}, indent=1) + "\n"


def from_json(text: str) -> tuple[PastStart, ...]:
    """The inverse of `to_json`, the last LONGEST of them. Raises ValueError, whose text says in one line what is wrong."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("starts"), list):
        raise ValueError("it is no history of starts")
    if document.get("format") != FORMAT:
        raise ValueError(f"it has format {str(document.get('format'))[:40]!r}, and this version knows {FORMAT}")
    starts = tuple(_start(index, row) for index, row in enumerate(document["starts"]))
    return starts[-LONGEST:]


def _plain(start: PastStart) -> dict[str, Any]:
    return {**asdict(start), "phase_s": dict(start.phase_s), "quiet_s": dict(start.quiet_s)}


def _start(index: int, row: object) -> PastStart:
    if not isinstance(row, dict):
        raise ValueError(f"start {index} is no table")
    texts = {name: row.get(name) for name in ("launch", "model", "at")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f'start {index} has no text "{name}"')
    if not _is_time(str(texts["at"])):
        raise ValueError(f'start {index} has no time "at"')
    if not _is_seconds(row.get("duration_s")):
        raise ValueError(f'start {index} has no seconds "duration_s"')
    return PastStart(
        launch=str(texts["launch"]),
        model=str(texts["model"]),
        at=str(texts["at"]),
        duration_s=float(row["duration_s"]),
        phase_s=_by_phase(index, row, "phase_s"),
        quiet_s=_by_phase(index, row, "quiet_s"),
    )


def _by_phase(index: int, row: Mapping[str, Any], name: str) -> dict[str, float]:
    """Labels that this version does not know are kept: they do no harm."""
    found = row.get(name)
    if not isinstance(found, dict) or not all(_is_seconds(seconds) for seconds in found.values()):
        raise ValueError(f'start {index} has no seconds by phase "{name}"')
    return {label: float(seconds) for label, seconds in found.items()}


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LONGEST_S


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
