"""Recorded starts: what happened to an engine as rows of JSON, and rows as the events they were. docs/recordings.md has the
format; recordings of other tools in it are read as well, so a reading is tolerant of kinds and fields it does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from mgpu_llm.core import readings
from mgpu_llm.core.events import (
    EngineExited,
    EngineSpawned,
    Event,
    GpusSampled,
    GpusUnobserved,
    GpuUnfit,
    HostSampled,
    KernelSaid,
    LineRead,
    LinesDropped,
    Preflighted,
    ProcessesSampled,
    StacksTaken,
)
from mgpu_llm.core.xid import Action

#: What comes after one of these notes is the recorder's own clean-up.
END_NOTES: Final = frozenset({"healthy", "exit", "limit", "stopping"})
FORMAT: Final = 1
#: A time beyond is none: no start takes thirty years.
LONGEST_S: Final = 1e9
#: What a recording may hold: as many values as two million lines of output have, more than the 64 MiB of ours. A small
#: gzipped file can become many more.
MOST_VALUES: Final = 10_000_000
ROW_VALUES: Final = 5
_KINDS: Final = frozenset(
    {"note", "log", "dropped", "sample", "unobserved", "host", "kernel", "unfit", "stacks", "preflight"}
)
#: The notes that somebody looks at, beside those that end a recording.
_NOTES: Final = frozenset({"attempt", "fault", "lost", "policy"})
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

Row = readings.Row


class RecordingError(Exception):
    """The file is no recording, or a broken one; the text says in one line what is wrong, and where."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded start. `rows` are those up to its end, `header` is the note that began it ({} where none did).

    `ended_by` names the note that ended it ("" when it breaks off), `ended_at` is in seconds since the spawn, and
    `exit_status` is set where the engine ended by itself.
    """

    rows: tuple[Row, ...]
    ended_by: str
    ended_at: float
    exit_status: int | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_gpus(self) -> bool:
        return any(row.get("gpus") or row["kind"] == "unobserved" for row in self.rows)

    @property
    def lines(self) -> tuple[str, ...]:
        """Every printed line, without colours."""
        return tuple(_text(row) for row in self.rows if row["kind"] == "log")


def read(lines: Iterable[bytes | str]) -> Recording:
    """The recording in `lines`. A last line that breaks off is left out: its writer was killed. Raises RecordingError."""
    rows = _rows(lines)
    found = cut(rows)
    for _ in rows:
        continue  # what follows the end is not kept, and must be rows all the same
    return found


def cut(rows: Iterable[Row]) -> Recording:
    """The recording in `rows`, without what follows its end and without what nobody looks at."""
    kept, last = list[Row](), 0.0
    header: Mapping[str, Any] = {}
    for row in rows:
        what = row.get("what") if row.get("kind") == "note" else None
        if what == "attempt":
            header = row
        if what in END_NOTES:
            status = row.get("rc") if what == "exit" else None
            return Recording(
                rows=tuple(kept), ended_by=str(what), ended_at=float(row["t"]), exit_status=status, header=header
            )
        last = max(last, float(row["t"]))
        if _is_looked_at(row):
            kept.append(row)
    return Recording(rows=tuple(kept), ended_by="", ended_at=last, header=header)


def _rows(lines: Iterable[bytes | str]) -> Iterator[Row]:
    """Raises RecordingError: at the end too, where there was nothing of a recording."""
    broken, empty, strange, left = "", True, True, MOST_VALUES
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if broken:
            raise RecordingError(broken)
        try:
            row = _checked(json.loads(line))
        except (ValueError, RecursionError) as error:  # json's own errors and a wrong encoding are ValueErrors
            broken = f"line {number} is not a row of a recording: {_in_one_line(error)}"
            continue
        empty, strange = False, strange and row["kind"] not in _KINDS
        left -= _values(row, line) if _is_looked_at(row) else 0
        if left < 0:
            raise RecordingError("it is larger than any recording")
        yield row
    if empty:
        raise RecordingError(broken or "it is empty")
    if strange:
        raise RecordingError("none of its rows is of a kind that recordings have")


def events(
    recording: Recording,
    *,
    attempt: int = 1,
    spawned_at: float = 0.0,
    reloaded: Callable[[Row], None] = lambda _: None,
) -> Iterator[Event]:
    """The start as events: the spawn, what each row says at its time, and the exit if there was one. Times are
    `spawned_at` plus the recorded ones. `reloaded` is given each row that says how the rest was judged, before the events that
    follow it. Raises RecordingError where a row's fields are not of their type."""
    yield EngineSpawned(at=spawned_at, attempt=attempt, pid=_top_pid(recording))
    for row in recording.rows:
        if row["kind"] == "note" and row.get("what") == "policy":
            reloaded(row)
        yield from of_row(row, attempt=attempt, spawned_at=spawned_at)
    if recording.exit_status is not None:
        yield EngineExited(at=spawned_at + recording.ended_at, attempt=attempt, status=recording.exit_status)


def of_row(row: Row, *, attempt: int, spawned_at: float) -> Iterator[Event]:
    """What one row says: none, one or two events. Raises RecordingError."""
    try:
        yield from _of_row(row, attempt, spawned_at + float(row["t"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        kind, why = row.get("kind"), f"{type(error).__name__}: {error}"
        raise RecordingError(f"the {kind} row at t={row.get('t')} has a field of a wrong type: {why}") from error


def _of_row(row: Row, attempt: int, at: float) -> Iterator[Event]:
    match row.get("kind"):
        case "log":
            yield LineRead(at=at, attempt=attempt, text=_text(row))
        case "dropped":
            yield LinesDropped(at=at, attempt=attempt, count=readings.integer(row.get("count", 0)))
        case "sample":
            if (processes := _listed(row, "procs", beside="gpus")) is not None:
                yield ProcessesSampled(at=at, attempt=attempt, processes=tuple(map(readings.process, processes)))
            listed = _listed(row, "gpus", beside="procs")
            gpus = [gpu for gpu in listed or () if "mem" in gpu]
            if gpus or listed == []:
                samples = tuple(readings.gpu(index, gpu) for index, gpu in enumerate(gpus))
                yield GpusSampled(at=at, attempt=attempt, gpus=samples)
        case "unobserved":
            yield GpusUnobserved(at=at, attempt=attempt, reason=str(row.get("why", "")))
        case "host":
            yield HostSampled(
                at=at,
                attempt=attempt,
                memory_percent=readings.number(row.get("mem")),
                storage_percent=readings.number(row.get("io")),
            )
        case "kernel":
            elsewhere, named = bool(row.get("elsewhere", False)), tuple(map(str, row.get("gpus") or ()))
            yield KernelSaid(at=at, attempt=attempt, text=_text(row), elsewhere=elsewhere, gpus=named)
        case "unfit":
            gpu, what, action = str(row.get("gpu", "")), str(row.get("what", "")), Action(row.get("action", ""))
            yield GpuUnfit(at=at, attempt=attempt, gpu=gpu, what=what, action=action)
        case "stacks":
            stacks = tuple(map(readings.stack, row.get("stacks") or ()))
            yield StacksTaken(at=at, attempt=attempt, stacks=stacks, unobserved=str(row.get("unobserved", "")))
        case "preflight":
            yield Preflighted(at=at, attempt=attempt, checked=readings.checked(row["checked"]))
        case _:
            return


def to_row(event: Event, spawned_at: float) -> Row | None:
    """The row that `of_row` makes this event of; None for events that are not recorded as rows."""
    match event:
        case LineRead():
            said: Row = {"kind": "log", "line": event.text}
        case LinesDropped():
            said = {"kind": "dropped", "count": event.count}
        case ProcessesSampled():
            said = {"kind": "sample", "procs": [readings.process_row(process) for process in event.processes]}
        case GpusSampled():
            said = {"kind": "sample", "gpus": [readings.gpu_row(gpu) for gpu in event.gpus]}
        case GpusUnobserved():
            said = {"kind": "unobserved", "why": event.reason}
        case HostSampled():
            said = {"kind": "host", "mem": event.memory_percent, "io": event.storage_percent}
        case KernelSaid():
            said = {"kind": "kernel", "line": event.text} | ({"elsewhere": True} if event.elsewhere else {})
            said |= {"gpus": list(event.gpus)} if event.gpus else {}
        case GpuUnfit():
            said = {"kind": "unfit", "gpu": event.gpu, "what": event.what, "action": event.action}
        case StacksTaken():
            said = {"kind": "stacks", "stacks": [readings.stack_row(stack) for stack in event.stacks]}
            said |= {"unobserved": event.unobserved} if event.unobserved else {}
        case Preflighted():
            said = {"kind": "preflight", "checked": readings.checked_row(event.checked)}
        case _:
            return None
    return {"t": round(event.at - spawned_at, 6), **said}


def note(t: float, what: str, **more: object) -> Row:
    """A note, `t` seconds since the spawn."""
    return {"t": round(t, 6), "kind": "note", "what": what, **more}


def _checked(row: object) -> Row:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    t = row.get("t")
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= LONGEST_S:
        raise ValueError('it has no "t" in seconds since the spawn')
    kind, what = row.get("kind"), row.get("what", "")
    if not isinstance(kind, str):
        raise ValueError('it has no "kind"')
    if kind == "log":  # nothing beside it is kept, however much there is
        return {"t": t, "kind": "log", "line": str(row.get("line", ""))}
    if kind == "note" and not isinstance(what, str):
        raise ValueError('its "what" is no text')
    if kind == "note" and what == "exit" and not isinstance(row.get("rc"), int):
        raise ValueError('its "rc" is no exit status')
    return row


def _is_looked_at(row: Row) -> bool:
    kind = row["kind"]
    return kind in _KINDS and (kind != "note" or row.get("what") in _NOTES)


def _values(row: Row, line: bytes | str) -> int:
    """How many values the row holds, no fewer than it does. A text counts as one, whatever is in it."""
    if row["kind"] == "log":
        return ROW_VALUES
    text = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    return ROW_VALUES + sum(map(text.count, (b",", b"[", b"{")))


def _in_one_line(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "it is no JSON"
    return " ".join(str(error).split())[:200] if isinstance(error, ValueError) else "it is nested too deeply"


def _listed(row: Row, name: str, *, beside: str) -> Any:
    """What the row lists under `name`, None where it does not tell. Recorders that always write both lists leave one empty
    for that; an empty list alone says that there was nothing."""
    listed = row.get(name)
    return listed if listed or (listed == [] and beside not in row) else None


def _text(row: Row) -> str:
    return _COLOURS.sub("", str(row.get("line", "")))


def _top_pid(recording: Recording) -> int:
    """The engine's first process: the recorders sample it first. 1 where no process was ever seen."""
    trees = (row["procs"] for row in recording.rows if row["kind"] == "sample" and row.get("procs"))
    try:
        return readings.integer(next(trees, [{"pid": 1}])[0]["pid"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return 1
