"""How the daemon's log lines look, by who reads them: the journal, a person at a terminal, or a file.

    journal    <5>attempt.started attempt=2 rung=p2p-off
    terminal   13:50:01 attempt.started attempt=2 rung=p2p-off                  (in colour)
    file       2025-11-23 13:50:01 info attempt.started attempt=2 rung=p2p-off
    engine     engine[Worker_TP1] Loading weights took 0.3 seconds

One record is one line, always: line ends and control characters inside values are escaped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TextIO

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
#: The <N> of sd-daemon(3): syslog's numbers.
PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
#: What the daemon itself has to say stands above the engine's small talk: `journalctl -p notice` tells the story.
NOTICE = 5
COLOUR = {"debug": "\x1b[2m", "info": "\x1b[36m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
#: The facts of an engine line; no other record has a fact of this name.
ENGINE = "engine_process"

Record = MutableMapping[str, Any]
Renderer = Callable[[Any, str, Record], str]


def configure(
    level: str, environ: Mapping[str, str], stream: TextIO, write: Callable[[str], None] | None = None
) -> None:
    """Sets structlog, the standard library's logging and its warnings up for `stream` (the daemon's stderr).

    `level` is debug, info, warning or error (KeyError otherwise: the config has checked it). `write` is given each
    finished line without its line end, in place of the stream: at a terminal it is `Console.write`, so that log lines
    and the live line do not fight. A line that cannot be written is lost; logging never raises.
    """
    render, stamp = _form(environ, stream)
    sink = _Sink(write or _writer(stream))
    timestamper = [structlog.processors.TimeStamper(fmt=stamp, utc=False)] if stamp else []
    structlog.configure(
        processors=[structlog.processors.add_log_level, *timestamper, structlog.processors.format_exc_info, render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    # Libraries speak through logging: what aiohttp and asyncio complain about must look like every other line.
    logging.basicConfig(level=max(LEVELS[level], logging.WARNING), handlers=[_FromLogging()], force=True)
    logging.captureWarnings(True)


def engine_line(process: str, text: str, level: str) -> None:
    """One line of the engine: who spoke (such as "Worker_TP1", "" if it did not say), what, and vLLM's own level
    (debug, info, warning or error in any case; any other counts as info)."""
    structlog.get_logger().log(LEVELS.get(level.lower(), logging.INFO), text, **{ENGINE: process})


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
    level = record.pop("level")
    return f"<{NOTICE if level == 'info' and ENGINE not in record else PRIORITY[level]}>{_told(record)}"


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
    match fact:
        case None:
            return "none"
        case bool():
            return "true" if fact else "false"
        case float():
            return f"{fact:.3f}".rstrip("0").rstrip(".")
        case tuple() | list() | set() | frozenset():
            return _quoted("; ".join(str(item) for item in fact))
        case _:
            return _quoted(str(fact))


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


class _FromLogging(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "text": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            facts["error"] = f"{record.exc_info[0].__name__}: {record.exc_info[1]}"
        structlog.get_logger().log(min(record.levelno, logging.ERROR) // 10 * 10, "library.message", **facts)
