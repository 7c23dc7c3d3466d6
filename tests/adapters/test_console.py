from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from mgpu_llm.adapters import journal
from mgpu_llm.adapters.console import Console, live_line
from mgpu_llm.core.status import Count
from tests.ctl.daemons import wait_for
from tests.ctl.samples import BACKOFF, FAILED, LOADING, SERVING, STARTING, STOPPED
from tests.ctl.terminal import Terminal, terminal


@pytest.fixture(autouse=True)
def a_terminal_with_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@contextmanager
def console_on(screen: Terminal) -> Iterator[Console]:
    with os.fdopen(os.dup(screen.slave), "w") as stream:
        console = Console(stream)
        yield console
        console.close()


def test_the_live_line_says_phase_shards_seconds_attempt_and_rung() -> None:
    assert live_line(STARTING).plain == ("weights  shards [###.......] 3/8  41 s  attempt 2  rung p2p-off")
    assert live_line(replace(STARTING, shards=None, quiet_s=12.4, rung="base")).plain == (
        "weights  41 s  quiet for 12 s  attempt 2  rung base"
    )
    assert "graphs [##########] 35/35" in live_line(replace(STARTING, graphs=Count(done=35, total=35))).plain
    assert "graphs [..........] 0/0" in live_line(replace(STARTING, graphs=Count(done=0, total=0))).plain


def test_the_live_line_of_a_load_says_percent_rate_and_what_is_left_in_80_columns() -> None:
    line = live_line(LOADING).plain
    assert line == "weights  [###.......] 38 %  120 MB/s  ~9 min left  230 s  attempt 1  rung base"
    assert len(line) <= 80
    assert "  ~42 s left  " in live_line(replace(LOADING, left_s=42.0)).plain
    compiling = live_line(replace(LOADING, phase="compile", weights_percent=100.0)).plain
    assert compiling == "compile  ~9 min left  230 s  attempt 1  rung base"
    unknown = replace(LOADING, weights_percent=None, weights_bytes_per_s=None, left_s=None)
    assert live_line(unknown).plain == "weights  shards [###.......] 3/8  230 s  attempt 1  rung base"


def test_the_live_line_of_the_other_states_says_the_state() -> None:
    assert live_line(SERVING).plain == "ready  41 s  attempt 2  rung p2p-off  degraded"
    assert live_line(BACKOFF).plain.startswith("backoff  next attempt in 4 s  ")
    assert live_line(STOPPED).plain == "stopped"
    assert live_line(FAILED).plain == "failed"


def test_log_lines_print_above_the_live_line_which_stays_one_line_at_the_bottom() -> None:
    with terminal(width=70) as screen, console_on(screen) as console:
        console.write("before")
        expected = ["before"]
        for second in range(20):
            console.show(replace(STARTING, elapsed_s=float(second)))
            line = f"\x1b[1mline {second}\x1b[0m " + "x" * (second * 10)  # from short to longer than two rows
            console.write(line)
            plain = f"line {second} " + "x" * (second * 10)
            expected += [plain[at : at + 70].rstrip() for at in range(0, len(plain.rstrip()), 70)]
        wait_for(lambda: screen.text.endswith("rung p2p-off") and "line 19" in screen.text, "the last line")
        assert screen.screen.lines[:-1] == expected
        assert screen.screen.lines[-1] == "weights  shards [###.......] 3/8  19 s  attempt 2  rung p2p-off"
        assert screen.screen.cursor_visible


def test_close_takes_the_live_line_away_and_leaves_the_log() -> None:
    with terminal() as screen, console_on(screen) as console:
        console.show(STARTING)
        console.write("kept")
        console.close()
        console.write("after")
        wait_for(lambda: "after" in screen.text, "the line after")
        assert screen.screen.lines == ["kept", "after"]
        assert screen.screen.cursor_visible


def test_on_a_narrow_terminal_the_live_line_is_cut_and_never_wraps() -> None:
    with terminal(width=24) as screen, console_on(screen) as console:
        console.show(STARTING)
        console.show(replace(STARTING, elapsed_s=42.0))
        wait_for(lambda: "weights" in screen.text, "the live line")
        console.write("log")
        wait_for(lambda: "log" in screen.text, "the log line")
        first, second = screen.screen.lines
    assert first == "log"
    assert second.startswith("weights  shards [###..")
    assert len(second) <= 24


def test_the_same_status_is_drawn_once() -> None:
    with terminal() as screen, console_on(screen) as console:
        for _ in range(50):
            console.show(STARTING)
        console.write("end")
        wait_for(lambda: "end" in screen.text, "the end")
        assert screen.raw.count("weights") == 2, "once by show, once below the log line"


def test_the_journals_terminal_output_goes_through_the_console_without_tearing() -> None:
    with terminal() as screen, console_on(screen) as console:
        with os.fdopen(os.dup(screen.slave), "w") as stream:
            journal.configure("info", os.environ, stream, write=console.write)
        try:
            console.show(STARTING)
            structlog.get_logger().warning("attempt.stalled", idle_s=20.4, phase="distributed-init")
            journal.engine_line("Worker_TP1", "Loading weights [1/2] took 0.3 seconds", "info")
            wait_for(lambda: "0.3 seconds" in screen.text, "the engine's line")
        finally:
            structlog.reset_defaults()
            logging.captureWarnings(False)
            logging.root.handlers.clear()
        first, second, live = screen.screen.lines
    assert first.endswith("attempt.stalled idle_s=20.4 phase=distributed-init")
    assert second.endswith("engine[Worker_TP1] Loading weights [1/2] took 0.3 seconds")
    assert live.startswith("weights  shards")
    assert "\x1b[1;33mattempt.stalled" in screen.raw


@pytest.mark.parametrize("environ", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {}])
def test_where_there_is_no_terminal_there_are_log_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    console = Console(stream)
    console.show(STARTING)
    console.write("one")
    console.show(SERVING)
    console.close()
    assert stream.getvalue() == "one\n"


def test_a_dumb_terminal_gets_log_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as screen, console_on(screen) as console:
        console.show(STARTING)
        console.write("one")
        console.show(SERVING)
        wait_for(lambda: "one" in screen.text, "the line")
        assert screen.raw == "one\r\n"


def test_a_terminal_that_goes_away_is_nobodys_error() -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        console = Console(stream)
        console.show(STARTING)
        os.close(master)
        console.show(SERVING)
        console.write("one")
        console.show(STARTING)
        console.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), slave)
