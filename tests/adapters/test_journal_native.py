"""What is said to journald by its own protocol, and what becomes of it while journald does not listen."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import structlog

from mgpu_llm.adapters import journal
from mgpu_llm.adapters.journal import native
from mgpu_llm.core.journal_fields import MESSAGE_IDS
from tests.support.fake_journald import FakeJournald, fields

Opener = Callable[[Path], native.Journal]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    journal.about({})
    journal.close()
    structlog.reset_defaults()
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def open_journal() -> Iterator[Opener]:
    """Opens one that is closed after the test."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(native.Journal(path, remark)))


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[FakeJournald]:
    with FakeJournald(tmp_path / "socket") as here:
        journal.configure("debug", here.environ, here.stream, socket=here.path)
        yield here


def remark(count: int) -> bytes:
    return native.entry({"DROPPED": str(count)})


def test_an_event_has_its_line_its_facts_as_fields_and_the_id_of_its_explanation(journald: FakeJournald) -> None:
    journal.about({"attempt": 2, "rung": "p2p-off", "phase": "weights"})
    structlog.get_logger().error(
        "engine.stalled", attempt=2, cause="nccl-p2p", quiet_s=11.04, changes=("A=1", "--b"), none=None
    )
    assert journald.entry() == {
        "MESSAGE": 'engine.stalled attempt=2 cause=nccl-p2p quiet_s=11.04 changes="A=1; --b" none=none',
        "MESSAGE_ID": MESSAGE_IDS["engine.stalled"],
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "mgpud",
        "SYSLOG_FACILITY": "3",
        "MGPU_SOURCE": "daemon",
        "MGPU_EVENT": "engine.stalled",
        "MGPU_ATTEMPT": "2",
        "MGPU_RUNG": "p2p-off",
        "MGPU_PHASE": "weights",
        "MGPU_CAUSE": "nccl-p2p",
        "MGPU_QUIET_S": "11.04",
        "MGPU_CHANGES": "A=1; --b",
    }
    assert journald.printed() == ""


def test_an_event_without_an_explanation_has_no_id(journald: FakeJournald) -> None:
    structlog.get_logger().info("control.request", verb="stop")
    said = journald.entry()
    assert (said["PRIORITY"], said["MGPU_EVENT"], said["MGPU_VERB"]) == ("5", "control.request", "stop")
    assert "MESSAGE_ID" not in said


@pytest.mark.parametrize(("level", "priority"), [("debug", "7"), ("INFO", "6"), ("warning", "4"), ("ERROR", "3")])
def test_a_line_of_the_engine_has_its_level_process_and_rank(journald: FakeJournald, level: str, priority: str) -> None:
    journal.about({"attempt": 2, "rung": "base", "phase": "weights"})
    journal.engine_line("Worker_TP1", "Loading weights took 0.3 seconds", level, 2)
    assert journald.entry() == {
        "MESSAGE": "engine[Worker_TP1] Loading weights took 0.3 seconds",
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "mgpud",
        "SYSLOG_FACILITY": "3",
        "MGPU_SOURCE": "engine",
        "MGPU_PROCESS": "Worker_TP1",
        "MGPU_RANK": "1",
        "MGPU_ATTEMPT": "2",
        "MGPU_RUNG": "base",
        "MGPU_PHASE": "weights",
    }


def test_a_late_line_of_an_engine_that_is_no_more_is_not_about_the_next(journald: FakeJournald) -> None:
    journal.about({"attempt": 2, "rung": "p2p-off", "phase": "boot"})
    journal.engine_line("", "NCCL INFO bye", "info", 1)
    said = journald.entry()
    assert (said["MESSAGE"], said["MGPU_ATTEMPT"]) == ("engine NCCL INFO bye", "1")
    assert said.keys().isdisjoint({"MGPU_PROCESS", "MGPU_RANK", "MGPU_PHASE", "MGPU_RUNG"})


def test_a_traceback_is_one_line_of_message_and_whole_in_its_field(journald: FakeJournald) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        structlog.get_logger().exception("daemon.fault")
    said = journald.entry()
    assert "\n" not in said["MESSAGE"]
    assert said["MGPU_EXCEPTION"].endswith("ValueError: first\nsecond")


def test_why_there_is_no_daemon_is_one_entry_with_all_its_lines(journald: FakeJournald) -> None:
    assert journal.cannot_start("cannot use the config:\n  a: b", 78, config=True)
    assert journal.cannot_start("another mgpud runs", 75, config=False)
    wrong, held = journald.entries(2)
    assert (wrong["MESSAGE"], wrong["PRIORITY"]) == ("cannot use the config:\n  a: b", "3")
    assert (wrong["MESSAGE_ID"], wrong["MGPU_EXIT_STATUS"]) == (MESSAGE_IDS["config.wrong"], "78")
    assert held["MGPU_EVENT"] == "daemon.not-started"


def test_without_a_socket_of_the_journal_lines_are_printed_and_the_caller_tells_why_it_cannot_start(
    tmp_path: Path,
) -> None:
    with FakeJournald(tmp_path / "socket") as here:
        journal.configure("info", here.environ, here.stream, socket=tmp_path / "none")
        structlog.get_logger().info("engine.ready", attempt=1)
        assert not journal.cannot_start("no", 78, config=True)
        assert here.printed() == "<5>engine.ready attempt=1\n"


def test_elsewhere_the_socket_is_left_alone(tmp_path: Path) -> None:
    lines = list[str]()
    with FakeJournald(tmp_path / "socket") as here:
        journal.configure("info", {}, here.stream, lines.append, socket=here.path)
        structlog.get_logger().info("engine.ready", attempt=1)
        journal.engine_line("Worker_TP1", "x", "info", 1)
    assert lines[0].endswith("info engine.ready attempt=1")
    assert lines[1].endswith("info engine[Worker_TP1] x attempt=1") is False
    assert lines[1].endswith("info engine[Worker_TP1] x")


def test_what_is_too_large_for_a_datagram_arrives_whole(journald: FakeJournald) -> None:
    text = "x" * 3_000_000
    structlog.get_logger().warning("record.failed", reason=text)
    structlog.get_logger().warning("record.failed", reason="short")
    assert journald.entry()["MGPU_REASON"] == text
    assert journald.entry()["MGPU_REASON"] == "short"


def test_a_journald_that_does_not_read_holds_nobody_up_and_gets_everything_in_order_once_it_does(
    tmp_path: Path,
    open_journal: Opener,
) -> None:
    with FakeJournald(tmp_path / "socket") as here:
        spoken = open_journal(here.path)
        begun = time.monotonic()
        for number in range(2000):
            spoken.send(native.entry({"N": str(number)}))
        assert time.monotonic() - begun < 10, "a wait for room would be 2,000 times as long"
        assert [entry["N"] for entry in here.entries(2000)] == [str(number) for number in range(2000)]
        spoken.linger(30)


def test_what_was_said_while_journald_was_gone_reaches_the_next_one(tmp_path: Path, open_journal: Opener) -> None:
    with FakeJournald(tmp_path / "socket") as first:
        spoken = open_journal(first.path)
        spoken.send(native.entry({"N": "before"}))
        assert first.entry() == {"N": "before"}
    spoken.send(native.entry({"N": "meanwhile"}))
    spoken.send(native.entry({"N": "last"}))
    with FakeJournald(tmp_path / "socket") as second:
        assert [entry["N"] for entry in second.entries(2)] == ["meanwhile", "last"]
        spoken.send(native.entry({"N": "after"}))
        assert second.entry() == {"N": "after"}


def test_a_journald_that_is_replaced_unseen_is_found_by_the_next_line(tmp_path: Path, open_journal: Opener) -> None:
    with FakeJournald(tmp_path / "socket") as first:
        spoken = open_journal(first.path)
    with FakeJournald(tmp_path / "socket") as second:
        spoken.send(native.entry({"N": "1"}))
        assert second.entry() == {"N": "1"}


def test_what_is_too_much_is_counted_and_told_and_the_engine_crowds_nobody_out(
    tmp_path: Path, open_journal: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "MOST_WAITING_BYTES", 20_000)
    with FakeJournald(tmp_path / "socket") as gone:
        spoken = open_journal(gone.path)
    for _ in range(100):
        spoken.send(native.entry({"ENGINE": "x"}), of_engine=True)
    spoken.send(native.entry({"DAEMON": "verdict"}))
    with FakeJournald(tmp_path / "socket") as here:
        kept = 10_000 // (len(native.entry({"ENGINE": "x"})) + native.ENTRY_BYTES)
        said = here.entries(kept + 2)
    assert said[:kept] == [{"ENGINE": "x"}] * kept
    assert said[kept:] == [{"DAEMON": "verdict"}, {"DROPPED": str(100 - kept)}]


def test_lines_of_several_threads_all_arrive(tmp_path: Path, open_journal: Opener) -> None:
    with FakeJournald(tmp_path / "socket") as here:
        spoken = open_journal(here.path)

        def talk(who: int) -> None:
            for number in range(200):
                spoken.send(native.entry({"WHO": str(who), "N": str(number)}))

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        said = here.entries(800)
        for thread in threads:
            thread.join()
    for who in range(4):
        assert [entry["N"] for entry in said if entry["WHO"] == str(who)] == [str(n) for n in range(200)]


def test_the_end_waits_until_everything_is_read_but_not_for_ever(tmp_path: Path, open_journal: Opener) -> None:
    with FakeJournald(tmp_path / "socket") as here:
        spoken = open_journal(here.path)
        spoken.send(native.entry({"N": "1"}))
        begun = time.monotonic()
        spoken.linger(0.2)
        assert time.monotonic() - begun >= 0.2
        here.entry()
        begun = time.monotonic()
        spoken.linger(60)
        assert time.monotonic() - begun < 50


def test_the_words_for_dropped_lines_are_an_entry_like_others(journald: FakeJournald) -> None:
    said = fields(journal._dropped(7))
    assert said["MESSAGE"] == 'journal.lines-dropped count=7 why="journald did not read"'
    assert (said["MESSAGE_ID"], said["MGPU_COUNT"]) == (MESSAGE_IDS["journal.lines-dropped"], "7")
