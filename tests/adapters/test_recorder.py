"""Recordings with real files, disks and killed processes."""

from __future__ import annotations

import gzip
import json
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters import recorder as recorders
from mgpu_llm.adapters.engine.output import CUT_MARK, LINE_BYTES
from mgpu_llm.adapters.recorder import Recorder, writer
from mgpu_llm.core import recording
from mgpu_llm.core.events import (
    Event,
    GpuSample,
    GpusSampled,
    LineRead,
    ProcessesSampled,
    ProcessSample,
    StartRequested,
    Ticked,
)
from mgpu_llm.core.recording import Recording, Row

MOMENT = datetime(2026, 11, 24, 21, 5, 0, tzinfo=UTC)
STEM = "20261124T210500Z"
MIB = 1 << 20


def recorder(folder: Path | None, *, keep: int = 20, max_bytes: int = 200 * MIB) -> Recorder:
    return Recorder(folder, keep=keep, max_bytes=max_bytes, now=lambda: MOMENT)


def header(rung: str = "p2p-off") -> Row:
    return recording.note(0.0, "attempt", format=recording.FORMAT, attempt=1, rung=rung)


def line(at: float, text: str, attempt: int = 1) -> LineRead:
    return LineRead(at=at, attempt=attempt, text=text)


def outcome(t: float, word: str) -> list[Row]:
    return [recording.note(t, "stopping"), recording.note(t, "outcome", outcome=word)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path) -> Recording:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return recording.read(lines)


def wait_until(met: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60
    while not met():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def record(keeper: Recorder, attempt: int, *texts: str, word: str = "stalled") -> None:
    keeper.begin(attempt, 100.0, header())
    for number, text in enumerate(texts):
        keeper.take(line(101.0 + number, text, attempt))
    keeper.end(word, outcome(50.0, word))


def test_an_attempt_becomes_one_packed_file_whose_name_says_when_what_and_how_it_ended(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    keeper = recorder(tmp_path / "records")
    record(keeper, 3, "loading")
    keeper.close()
    assert names(tmp_path / "records") == [f"{STEM}-a3-p2p-off-stalled.jsonl.gz"]
    (file,) = (tmp_path / "records").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert logged == []


def test_what_was_taken_is_replayed_as_the_events_it_was(tmp_path: Path) -> None:
    process = ProcessSample(pid=7, started=5, name="VLLM", state="S", cpu_s=1.5, major_faults=2, rss_bytes=4096)
    gpu = GpuSample(uuid="GPU-1", used_bytes=5, total_bytes=9, processes=((7, None),))
    happened: list[Event] = [
        line(101.0, "loading \udcff € \x1f"),
        ProcessesSampled(at=102.0, attempt=1, processes=(process,)),
        GpusSampled(at=102.5, attempt=1, gpus=(gpu,)),
    ]
    keeper = recorder(tmp_path)
    keeper.begin(1, 100.0, header())
    for event in [StartRequested(at=100.5), *happened, Ticked(at=103.0), line(104.0, "of a dead attempt", attempt=0)]:
        keeper.take(event)
    keeper.end("crashed", [recording.note(5.0, "exit", rc=-9)])
    keeper.take(line(106.0, "too late"))
    keeper.close()
    (file,) = tmp_path.iterdir()
    found = read(file)
    assert [*recording.events(found, spawned_at=100.0)][1:-1] == happened
    assert found.header["rung"] == "p2p-off"
    assert (found.ended_by, found.exit_status) == ("exit", -9)


def test_a_row_of_our_own_stands_where_it_came_and_is_left_out_between_attempts(tmp_path: Path) -> None:
    keeper = recorder(tmp_path)
    keeper.note(99.0, lambda t: recording.note(t, "policy", n=0))
    keeper.begin(1, 100.0, header())
    keeper.take(line(101.0, "before"))
    keeper.note(102.5, lambda t: recording.note(t, "policy", n=1))
    keeper.take(line(102.0, "after"))
    keeper.end("stalled", outcome(50.0, "stalled"))
    keeper.note(151.0, lambda t: recording.note(t, "policy", n=2))
    keeper.close()
    told = [row.get("line", row.get("n")) for row in read(next(tmp_path.iterdir())).rows[1:]]
    assert told == ["before", 1, "after"]


def test_while_an_attempt_loads_its_file_is_plain_and_can_be_read(tmp_path: Path) -> None:
    keeper = recorder(tmp_path)
    keeper.begin(1, 100.0, header())
    keeper.take(line(101.0, "loading"))
    file = tmp_path / f"{STEM}-a1-p2p-off-running.jsonl"
    wait_until(lambda: file.exists() and b"loading" in file.read_bytes())
    assert read(file).lines == ("loading",)
    keeper.close()


@pytest.mark.parametrize("how", ["another begins", "the daemon ends"])
def test_an_attempt_that_nobody_ended_is_cut(tmp_path: Path, how: str) -> None:
    keeper = recorder(tmp_path)
    keeper.begin(1, 100.0, header())
    keeper.take(line(101.0, "loading"))
    if how == "another begins":
        record(keeper, 2)
    keeper.close()
    file = tmp_path / f"{STEM}-a1-p2p-off-cut.jsonl.gz"
    assert read(file).lines == ("loading",)
    assert len(names(tmp_path)) == (2 if how == "another begins" else 1)


@pytest.mark.parametrize(("folder", "keep"), [(None, 20), ("records", 0)])
def test_without_a_folder_or_with_none_to_keep_nothing_is_recorded(
    tmp_path: Path, folder: str | None, keep: int
) -> None:
    keeper = recorder(folder and tmp_path / folder, keep=keep)  # type: ignore[arg-type]
    record(keeper, 1, "loading")
    keeper.close()
    assert names(tmp_path) == []


def test_a_rung_of_any_name_gives_a_name_in_the_folder_and_two_of_one_second_do_not_collide(tmp_path: Path) -> None:
    keeper = recorder(tmp_path)
    for _ in range(2):
        keeper.begin(1, 100.0, header("../Utilisation 0.85"))
        keeper.end("ready", [])
    keeper.close()
    assert names(tmp_path) == [
        f"2026112{day}-a1-..-utilisation-0.85-ready.jsonl.gz" for day in ("4T210500Z", "4T210501Z")
    ]


def test_the_longest_line_that_is_judged_is_recorded_whole(tmp_path: Path) -> None:
    longest = "x" * (LINE_BYTES - 20) + " CUDA out of memory" + CUT_MARK
    keeper = recorder(tmp_path)
    record(keeper, 1, longest)
    keeper.close()
    (file,) = tmp_path.iterdir()
    assert read(file).lines == (longest,)


def test_rows_that_come_faster_than_they_can_be_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "MOST_WAITING", 0)
    keeper = recorder(tmp_path)
    keeper.begin(1, 100.0, header())
    for number in range(5):
        keeper.take(line(101.0 + number, "flood"))
    monkeypatch.setattr(recorders, "MOST_WAITING", 1000)
    keeper.take(line(107.0, "after the flood"))
    monkeypatch.setattr(recorders, "MOST_WAITING", 0)
    keeper.take(line(108.0, "the last word"))
    keeper.end("ready", [recording.note(9.0, "healthy")])
    keeper.close()
    (file,) = tmp_path.iterdir()
    found = read(file)
    assert found.lines == ("after the flood",)
    lost = [(row["t"], row["count"]) for row in found.rows if row.get("what") == "lost"]
    assert lost == [(7.0, 5), (9.0, 1)]
    assert found.ended_by == "healthy"


def test_a_recording_stops_growing_at_its_limit_says_so_and_still_has_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[EventDict]
) -> None:
    monkeypatch.setattr(writer, "MOST_BYTES", 128 << 10)
    keeper = recorder(tmp_path)
    record(keeper, 1, *(f"{number} {'x' * 1000}" for number in range(300)))
    keeper.close()
    (file,) = tmp_path.iterdir()
    with gzip.open(file) as lines:
        rows = [json.loads(row) for row in lines]
    assert sum(len(json.dumps(row)) for row in rows) < 128 << 10
    assert [row["what"] for row in rows if row["kind"] == "note"] == ["attempt", "limit", "stopping", "outcome"]
    assert read(file).ended_by == "limit"
    assert len(read(file).lines) > 50
    assert logged == []


def test_only_the_newest_recordings_are_kept_and_files_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = ["20200101T000000Z-a1-base-ready.jsonl.gz.bak", "notes.jsonl", "20200101T000000Z.jsonl"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / "20200101T000000Z-a1-base-ready.jsonl").mkdir()
    (tmp_path / "20200101T000000Z-a2-base-ready.jsonl").symlink_to("notes.jsonl")
    keeper = recorder(tmp_path, keep=3)
    for attempt in range(1, 6):
        record(keeper, attempt)
    keeper.close()
    assert [name for name in names(tmp_path) if name.startswith(STEM)] == [
        f"{STEM}-a{attempt}-p2p-off-stalled.jsonl.gz" for attempt in (3, 4, 5)
    ]
    assert len(names(tmp_path)) == 3 + len(foreign) + 2


def test_all_recordings_together_stay_within_their_size_while_one_grows(tmp_path: Path) -> None:
    for day in range(1, 7):
        (tmp_path / f"2026110{day}T000000Z-a1-base-ready.jsonl.gz").write_bytes(bytes(200 << 10))
    keeper = recorder(tmp_path, max_bytes=MIB)
    keeper.begin(1, 100.0, header())
    wait_until(lambda: len(names(tmp_path)) == 6)
    for number in range(500):
        keeper.take(line(101.0, f"{number} {'x' * 1000}"))
    wait_until(lambda: len(names(tmp_path)) == 3)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= MIB
    assert names(tmp_path)[0] == "20261105T000000Z-a1-base-ready.jsonl.gz"
    keeper.end("ready", [])
    keeper.close()
