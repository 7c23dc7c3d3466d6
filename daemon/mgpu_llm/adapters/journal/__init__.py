"""How the daemon's log lines look, by who reads them: the journal, a person at a terminal, or a file.

    journal    an entry of fields, MESSAGE=attempt.started attempt=2 rung=p2p-off
               <5>attempt.started attempt=2 rung=p2p-off                        (where its socket cannot be reached)
    terminal   13:50:01 attempt.started attempt=2 rung=p2p-off                  (in colour)
    file       2025-11-23 13:50:01 info attempt.started attempt=2 rung=p2p-off
    engine     engine[Worker_TP1] Loading weights took 0.3 seconds

One record is one line, always: line ends and control characters inside values are escaped.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

from mgpu_llm.adapters.journal import levels, native
from mgpu_llm.core import journal_fields

LEVELS, tell_from = levels.LEVELS, levels.tell_from
#: The <N> of sd-daemon(3): syslog's numbers.
PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
#: What the daemon itself has to say stands above the engine's small talk: `journalctl -p notice` tells the story.
NOTICE = 5
COLOUR = {"debug": "\x1b[2m", "info": "\x1b[36m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
#: The facts of an engine line; no other record has a fact of this name.
ENGINE = "engine_process"
#: What systemd calls us, from ExecStart, and the facility "daemon": as they stand beside what is only printed.
IDENTITY: Final = {"SYSLOG_IDENTIFIER": "mgpud", "SYSLOG_FACILITY": "3"}
#: How long the end of the process may wait until journald has read its last words.
LINGER_S: Final = 1.0

Record = MutableMapping[str, Any]
Renderer = Callable[[Any, str, Record], str]
#: What structlog gives to its logger: the line, and by name whether the engine has said it.
_Entry = tuple[tuple[bytes], dict[str, bool]]


class _Here:
    """What the process has of it: the journal, where it is spoken to natively, and what every line is about meanwhile."""

    journal: native.Journal | None = None
    about: Mapping[str, object] = {}


def configure(
    level: str,
    environ: Mapping[str, str],
    stream: TextIO,
    write: Callable[[str], None] | None = None,
    socket: Path = native.SOCKET,
) -> None:
    """Sets structlog, the standard library's logging and its warnings up for `stream` (the daemon's stderr).

    `level` is debug, info, warning or error (KeyError otherwise: the config has checked it). `write` is given each
    finished line without its line end, in place of the stream: at a terminal it is `Console.write`, so that log lines
    and the live line do not fight. A line that cannot be written is lost; logging never raises. Where the stream is the
    journal's and `socket` is answered, lines are entries with fields, and the stream is left alone.
    """
    _Here.journal = _native(socket) if under_journal(environ, stream) else None
    render: Renderer | Callable[[Any, str, Record], _Entry]
    sink: _Sink | _NativeSink
    if _Here.journal is not None:
        render, stamp, sink = _for_native, "", _NativeSink(_Here.journal)
    else:
        render, stamp = _form(environ, stream)
        sink = _Sink(write or _writer(stream))
    timestamper = [structlog.processors.TimeStamper(fmt=stamp, utc=False)] if stamp else []
    structlog.configure(
        processors=[structlog.processors.add_log_level, *timestamper, structlog.processors.format_exc_info, render],
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    # Libraries speak through logging: what aiohttp and asyncio complain about must look like every other line.
    logging.basicConfig(handlers=[_FromLogging()], force=True)
    logging.captureWarnings(True)
    tell_from(level)


def engine_line(process: str, text: str, level: str, attempt: int | None = None) -> None:
    """One line of the engine: who spoke (such as "Worker_TP1", "" if it did not say), what, and vLLM's own level
    (debug, info, warning or error in any case; any other counts as info). `attempt` is that of the engine that spoke."""
    who = {ENGINE: process} if attempt is None else {ENGINE: process, "attempt": attempt}
    structlog.get_logger().log(LEVELS.get(level.lower(), logging.INFO), text, **who)


def close() -> None:
    """The last words are read, or LINGER_S is over. Whatever is said after that is lost, until `configure`."""
    spoken, _Here.journal = _Here.journal, None
    if spoken is not None:
        spoken.linger(LINGER_S)
        spoken.close()


def about(facts: Mapping[str, object]) -> None:
    """What lines are about from now on, such as attempt, rung and phase: fields of each that does not say otherwise itself."""
    _Here.about = facts


def cannot_start(message: str, exit_status: int, *, config: bool) -> bool:
    """Why there is no daemon, as one entry with all its lines; `config`: it is for what the config says. False where the journal
    is not spoken to natively: then it is the caller's to tell."""
    if _Here.journal is None:
        return False
    event = "config.wrong" if config else "daemon.not-started"
    facts = {"exit_status": exit_status}
    _Here.journal.send(native.entry({**_fields(event, facts), "MESSAGE": message, "PRIORITY": str(PRIORITY["error"])}))
    return True


def under_journal(environ: Mapping[str, str], stream: TextIO) -> bool:
    """Whether the stream is the journal's own: JOURNAL_STREAM is inherited by children whose stderr goes elsewhere,
    so its device and inode count (systemd.exec(5))."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _form(environ: Mapping[str, str], stream: TextIO) -> tuple[Renderer, str]:
    """The renderer and the format of its time ("" for none: the journal stamps by itself)."""
    if under_journal(environ, stream):
        return _for_journal, ""
    if stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb":
        return _for_terminal, "%H:%M:%S"
    return _for_file, "%Y-%m-%d %H:%M:%S"


def _for_journal(_: object, __: str, record: Record) -> str:
    priority = _priority(record)
    return f"<{priority}>{_told(record)}"


def _priority(record: Record) -> int:
    """Takes the level out of the record."""
    level = record.pop("level")
    return NOTICE if level == "info" and ENGINE not in record else PRIORITY[level]


def _for_native(_: object, __: str, record: Record) -> _Entry:
    priority, message = str(_priority(record)), _told(record)
    of_engine = ENGINE in record
    facts = {name: fact for name, fact in record.items() if name not in ("event", ENGINE)}
    fields = _engine_fields(str(record[ENGINE]), facts) if of_engine else _fields(str(record["event"]), facts)
    said = native.entry({**fields, "MESSAGE": message, "PRIORITY": priority})
    return (said,), {"of_engine": of_engine}


def _fields(event: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Of an event of the daemon: each fact is one."""
    fields = {
        **_shown({**_Here.about, **facts}),
        journal_fields.SOURCE: journal_fields.DAEMON,
        journal_fields.EVENT: event,
    }
    if message_id := journal_fields.MESSAGE_IDS.get(event):
        fields["MESSAGE_ID"] = message_id
    return fields | IDENTITY


def _engine_fields(process: str, facts: Mapping[str, object]) -> dict[str, str]:
    # What an engine that is no more still had in its pipe is not about the phase and the rung of the next.
    late = "attempt" in facts and facts["attempt"] != _Here.about.get("attempt")
    fields = {**_shown(facts if late else {**_Here.about, **facts}), journal_fields.SOURCE: journal_fields.ENGINE}
    fields |= {journal_fields.PROCESS: process} if process else {}
    fields |= {journal_fields.RANK: rank} if (rank := journal_fields.rank(process)) else {}
    return fields | IDENTITY


def _shown(facts: Mapping[str, object]) -> dict[str, str]:
    """Field by fact. What is not known, and what is empty, is no field."""
    texts = {journal_fields.field(name): _text(fact) for name, fact in facts.items() if fact is not None}
    return {name: text for name, text in texts.items() if text}


def _native(socket: Path) -> native.Journal | None:
    """The one that there is goes on: it may still have something to give."""
    if _Here.journal is not None and _Here.journal.path == socket:
        return _Here.journal
    close()
    try:
        found = native.Journal(socket, _dropped)
    except OSError:  # as in a container that has the stream of the host's journal and not its socket
        return None
    atexit.register(close)
    return found


def _dropped(count: int) -> bytes:
    facts = {"count": count, "why": "journald did not read"}
    message = _told({"event": "journal.lines-dropped", **facts})
    fields = {**_fields("journal.lines-dropped", facts), "MESSAGE": message, "PRIORITY": str(PRIORITY["warning"])}
    return native.entry(fields)


def _for_file(_: object, __: str, record: Record) -> str:
    return f"{record.pop('timestamp')} {record.pop('level')} {_told(record)}"


def _for_terminal(_: object, __: str, record: Record) -> str:
    level, time = record.pop("level"), record.pop("timestamp")
    of_engine = ENGINE in record
    # The engine's small talk stays in the background; its warnings and errors stand out as ours do.
    colour = DIM if of_engine and level in ("debug", "info") else BOLD + COLOUR[level]
    head, _, rest = _told(record).partition(" ")
    return f"{DIM}{time}{RESET} {colour}{head}{RESET} {rest}".rstrip()


def _told(record: Record) -> str:
    """The event's name and its facts; or, of an engine line, who spoke and what."""
    event = _escaped(str(record["event"]))
    if ENGINE in record:
        process = _escaped(str(record[ENGINE]))
        return f"engine[{process}] {event}" if process else f"engine {event}"
    facts = [f"{key}={_value(fact)}" for key, fact in record.items() if key not in ("event", ENGINE)]
    return " ".join([event, *facts])


def _value(fact: object) -> str:
    return _quoted(_text(fact))


def _text(fact: object) -> str:
    match fact:
        case None:
            return "none"
        case bool():
            return "true" if fact else "false"
        case float():
            return f"{fact:.3f}".rstrip("0").rstrip(".")
        case tuple() | list() | set() | frozenset():
            return "; ".join(str(item) for item in fact)
        case _:
            return str(fact)


def _quoted(text: str) -> str:
    if text and text.isprintable() and not any(char in ' "=' for char in text):
        return text
    return _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _writer(stream: TextIO) -> Callable[[str], None]:
    def write(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return write


class _Sink:
    """What structlog calls a logger: takes finished lines, whatever their level."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def msg(self, line: str) -> None:
        try:
            self._write(line)
        except (OSError, ValueError):
            # A full disk or a reader that left: the engine's supervision must not end for its log.
            return

    debug = info = warning = error = critical = msg


class _NativeSink:
    """The same for entries of the journal."""

    def __init__(self, journal: native.Journal) -> None:
        self._journal = journal

    def msg(self, said: bytes, *, of_engine: bool) -> None:
        self._journal.send(said, of_engine=of_engine)

    debug = info = warning = error = critical = msg


class _FromLogging(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "text": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            facts["error"] = f"{record.exc_info[0].__name__}: {record.exc_info[1]}"
        structlog.get_logger().log(min(record.levelno, logging.ERROR) // 10 * 10, "library.message", **facts)
