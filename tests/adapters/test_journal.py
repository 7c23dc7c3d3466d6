from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from mgpu_llm.adapters.journal import configure, engine_line, tell_from, under_journal
from tests.ctl.daemons import wait_for
from tests.ctl.terminal import terminal


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


class Journal:
    """A file that stands for the journal's stream: JOURNAL_STREAM names its device and inode. Its socket is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path.with_name("no-socket")
        self.stream = path.open("w", encoding="utf-8")
        found = path.stat()
        self.environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}

    @property
    def lines(self) -> list[str]:
        return self.path.read_text("utf-8").splitlines()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal")
    configure("debug", made.environ, made.stream, socket=made.socket)
    yield made
    made.stream.close()


def test_under_systemd_each_level_has_its_priority_and_no_time_or_colour(journal: Journal) -> None:
    log = structlog.get_logger()
    log.debug("heartbeat.moved", signal="rss")
    log.info("attempt.started", attempt=2, rung="p2p-off")
    log.warning("service.degraded")
    log.error("ladder.spent", attempts=3)
    log.critical("daemon.broken")
    assert journal.lines == [
        "<7>heartbeat.moved signal=rss",
        "<5>attempt.started attempt=2 rung=p2p-off",
        "<4>service.degraded",
        "<3>ladder.spent attempts=3",
        "<2>daemon.broken",
    ]


@pytest.mark.parametrize(
    ("fact", "shown"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "no"', '"say \\"no\\""'),
        ("first\nsecond\ttail", '"first\\nsecond\\ttail"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
        ("line\u2028separator\x9b", '"line\\u2028separator\\x9b"'),
        ("Größe", "Größe"),
        (Path("/etc/mgpu-llm/mgpu-llm.toml"), "/etc/mgpu-llm/mgpu-llm.toml"),
        (None, "none"),
        (True, "true"),
        (False, "false"),
        (7, "7"),
        (69.2, "69.2"),
        (2.0, "2"),
        (0.00049, "0"),
        (1 / 3, "0.333"),
        (("NCCL_P2P_DISABLE=1", "--flag"), '"NCCL_P2P_DISABLE=1; --flag"'),
        ((), '""'),
    ],
)
def test_a_fact_is_one_word_or_quoted(journal: Journal, fact: object, shown: str) -> None:
    structlog.get_logger().info("fact.told", fact=fact, after=1)
    assert journal.lines == [f"<5>fact.told fact={shown} after=1"]


def test_an_exception_is_one_record_on_one_line(journal: Journal) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        structlog.get_logger().exception("loop.failed", attempt=1)
    [line] = journal.lines
    assert line.startswith('<3>loop.failed attempt=1 exception="Traceback (most recent call last):\\n')
    assert line.endswith('ValueError: first\\nsecond"')


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", 7), ("INFO", 6), ("info", 6), ("WARNING", 4), ("ERROR", 3), ("error", 3), ("", 6), ("CHATTER", 6)],
)
def test_an_engine_line_says_which_process_spoke_at_its_own_level(journal: Journal, level: str, priority: int) -> None:
    engine_line("Worker_TP1", "Loading weights took 0.3 seconds", level)
    assert journal.lines == [f"<{priority}>engine[Worker_TP1] Loading weights took 0.3 seconds"]


def test_an_engine_line_of_nobody_and_with_controls_is_still_one_line(journal: Journal) -> None:
    engine_line("", "Traceback:\r\n  x = 1\x1b[0m\x00", "error")
    engine_line("A]\nB", "", "info")
    assert journal.lines == ["<3>engine Traceback:\\r\\n  x = 1\\x1b[0m\\x00", "<6>engine[A]\\nB] "]


def test_what_is_below_the_level_is_left_out(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal")
    with made.stream:
        configure("warning", made.environ, made.stream, socket=made.socket)
        structlog.get_logger().info("attempt.started")
        engine_line("APIServer", "Route: /ping", "info")
        engine_line("APIServer", "out of memory", "error")
    assert made.lines == ["<3>engine[APIServer] out of memory"]


def test_the_level_can_change_and_everything_else_stays(journal: Journal) -> None:
    log = structlog.get_logger()
    tell_from("error")
    log.warning("left.out")
    log.error("told")
    logging.getLogger("aiohttp").warning("left out")
    tell_from("debug")
    log.debug("told.too")
    assert journal.lines == ["<3>told", "<7>told.too"]


def test_a_level_that_is_none_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        configure("loud", {}, io.StringIO())


def test_in_a_file_each_line_has_its_time_and_level(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as stream:
        configure("info", {}, stream)
        structlog.get_logger().warning("service.degraded", rung="p2p-off")
        engine_line("EngineCore", "ready", "info")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    first, second = path.read_text().splitlines()
    assert re.fullmatch(f"{stamp} warning service.degraded rung=p2p-off", first)
    assert re.fullmatch(rf"{stamp} info engine\[EngineCore\] ready", second)


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_terminal_that_wants_colour_gets_it(environ: dict[str, str], coloured: bool) -> None:
    with terminal() as screen:
        with os.fdopen(os.dup(screen.slave), "w") as stream:
            configure("info", environ, stream)
            structlog.get_logger().error("ladder.spent", attempts=3)
            engine_line("Worker_TP0", "slow", "warning")
        wait_for(lambda: "slow" in screen.text, "the lines")
        assert ("\x1b[31mladder.spent\x1b[0m attempts=3" in screen.raw) is coloured
        assert ("\x1b" in screen.raw) is coloured
        first, second = screen.screen.lines
    assert re.search(r"\d\d:\d\d:\d\d (error )?ladder.spent attempts=3$", first)
    assert second.endswith("engine[Worker_TP0] slow")


def test_lines_go_through_write_where_one_is_given() -> None:
    lines: list[str] = []
    stream = io.StringIO()
    configure("info", {}, stream, lines.append)
    structlog.get_logger().info("attempt.started", attempt=1)
    assert [line.endswith("info attempt.started attempt=1") for line in lines] == [True]
    assert stream.getvalue() == ""


@pytest.mark.parametrize("environ", [{}, {"JOURNAL_STREAM": "1:2"}, {"JOURNAL_STREAM": "junk"}])
def test_another_journal_stream_than_ours_does_not_count(tmp_path: Path, environ: dict[str, str]) -> None:
    with (tmp_path / "log").open("w") as stream:
        assert not under_journal(environ, stream)
    assert not under_journal(environ, stream), "a closed stream"
    assert not under_journal(environ, io.StringIO()), "a stream without a file"


def test_what_libraries_log_and_warn_of_looks_like_every_other_line(journal: Journal) -> None:
    try:
        raise OSError("no\nroute")
    except OSError:
        logging.getLogger("aiohttp.server").exception("Error handling request")
    logging.getLogger("asyncio").info("below warning: left out")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    first, second = journal.lines
    assert first == (
        '<3>library.message logger=aiohttp.server text="Error handling request" error="OSError: no\\nroute"'
    )
    assert second.startswith("<4>library.message logger=py.warnings text=")
    assert "DeprecationWarning: old way" in second


def test_a_task_that_fails_unseen_is_one_line_too(journal: Journal) -> None:
    async def fail() -> None:
        raise ValueError("lost")

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task

    asyncio.run(main())
    [line] = journal.lines
    assert line.startswith("<3>library.message logger=asyncio text=")
    assert line.endswith('error="ValueError: lost"')


def test_logging_to_nowhere_never_raises() -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        configure("info", {}, full)
        structlog.get_logger().error("ladder.spent")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    with Path(os.devnull).open("w") as closed:
        configure("info", {}, closed)
    structlog.get_logger().error("ladder.spent")
    engine_line("Worker", "x", "info")
