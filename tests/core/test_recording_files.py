"""Files of recordings: what is read of them, where they end, and what is refused and why."""

from __future__ import annotations

import json

import pytest

from mgpu_llm.core import recording
from mgpu_llm.core.events import (
    EngineExited,
    EngineSpawned,
    LineRead,
)
from mgpu_llm.core.recording import Recording, RecordingError, Row, cut, events, read


def lines(*rows: object) -> list[str]:
    return [row if isinstance(row, str) else json.dumps(row) for row in rows]


LOG = {"t": 1.0, "kind": "log", "line": "kept"}
LINE_1 = "line 1 is not a row of a recording: "


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ([], "it is empty"),
        (["", "  \n"], "it is empty"),
        (["{}}"], LINE_1 + "it is no JSON"),
        ([b'"\xff"'], LINE_1 + "it is no JSON"),
        (["[" * 100_000], LINE_1 + "it is nested too deeply"),
        (["5"], LINE_1 + "it is no JSON object"),
        (['{"kind": "log"}'], LINE_1 + 'it has no "t" in seconds since the spawn'),
        (['{"t": 1}'], LINE_1 + 'it has no "kind"'),
        (['{"t": 1, "kind": 5}'], LINE_1 + 'it has no "kind"'),
        ([{"t": 1, "kind": "note", "what": "exit"}], LINE_1 + 'its "rc" is no exit status'),
        ([{"t": 1, "kind": "note", "what": "exit", "rc": "1"}], LINE_1 + 'its "rc" is no exit status'),
        ([{"t": 1, "kind": "note", "what": ["exit"]}], LINE_1 + 'its "what" is no text'),
        ([{"t": 1, "kind": "note", "what": {"exit": 1}}], LINE_1 + 'its "what" is no text'),
        ([{"t": 1, "kind": "note", "what": None}], LINE_1 + 'its "what" is no text'),
        ([{"t": 1, "kind": "weather"}], "none of its rows is of a kind that recordings have"),
        ([LOG, "x", LOG], "line 2 is not a row of a recording: it is no JSON"),
        ([recording.note(1, "healthy"), "x", LOG], "line 2 is not a row of a recording: it is no JSON"),
        ([LOG, "", "x", "y"], "line 3 is not a row of a recording: it is no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_recording_says_why_and_where(written: list[object], why: str) -> None:
    with pytest.raises(RecordingError) as refused:
        read([row if isinstance(row, bytes) else lines(row)[0] for row in written])
    assert str(refused.value) == why


@pytest.mark.parametrize(
    "t", ["-1", "true", "null", '"1"', "NaN", "Infinity", "-Infinity", "1e999", "1e10", "1" + "0" * 400]
)
def test_a_time_that_is_none_is_refused(t: str) -> None:
    with pytest.raises(RecordingError, match=r'it has no "t" in seconds since the spawn'):
        read([f'{{"t": {t}, "kind": "log", "line": "x"}}'])


def test_a_number_of_thousands_of_digits_is_refused_in_one_short_line() -> None:
    with pytest.raises(RecordingError) as refused:
        read([f'{{"t": {"1" * 5000}, "kind": "log"}}'])
    assert len(str(refused.value)) < 300


SAMPLE = {"t": 1.0, "kind": "sample", "procs": [{"pid": 1}]}


def test_only_what_somebody_looks_at_is_kept() -> None:
    unused: list[object] = [{"t": 5.0, "kind": "weather"}, {"t": 6.0, "kind": "note", "what": "cmd"}]
    wordy = {**LOG, "more": [[]] * 9}
    recorded = read(lines(*unused, wordy, recording.note(2.0, "lost", count=3), *unused))
    assert recorded.rows == (LOG, recording.note(2.0, "lost", count=3))
    assert recorded.ended_at == 6.0


@pytest.mark.parametrize(
    ("row", "fitting"),
    [(LOG, 20), ({**LOG, "line": ",[{" * 9, "more": [[]] * 9}, 20), (SAMPLE, 10), ({"t": 1, "kind": "weather"}, 1000)],
)
def test_what_holds_more_than_a_recording_can_is_refused(
    monkeypatch: pytest.MonkeyPatch, row: Row, fitting: int
) -> None:
    monkeypatch.setattr(recording, "MOST_VALUES", 100)
    read(lines(LOG, *[row] * (fitting - 1)))
    with pytest.raises(RecordingError, match=r"^it is larger than any recording$"):
        read([line.encode() for line in lines(*[LOG] * 10, *[row] * fitting, *[SAMPLE] * 10)])


def test_a_last_line_that_breaks_off_is_left_out() -> None:
    assert read([*lines(LOG), '{"t": 2.0, "kind": "lo']).lines == ("kept",)
    assert read([*lines(LOG), '{"t": 2.0, "kind": "lo', "", "\n"]).lines == ("kept",)


def test_bytes_and_blank_lines_are_read() -> None:
    assert read([b'{"t": 1.0, "kind": "log", "line": "\xc3\xbc"}\n', b"\n"]).lines == ("ü",)


def test_what_the_recorder_cleaned_up_is_not_part_of_a_recording() -> None:
    rows = [
        recording.note(0.0, "cmd"),
        {"t": 1.0, "kind": "log", "line": "kept"},
        recording.note(2.0, "exit", rc=3),
        {"t": 3.0, "kind": "log", "line": "clean-up"},
    ]
    recorded = read(lines(*rows))
    assert recorded.lines == ("kept",)
    assert (recorded.ended_by, recorded.ended_at, recorded.exit_status) == ("exit", 2.0, 3)
    assert list(events(recorded))[-1] == EngineExited(at=2.0, attempt=1, status=3)


@pytest.mark.parametrize("what", sorted(recording.END_NOTES - {"exit"}))
def test_only_an_exit_is_an_event_of_its_own(what: str) -> None:
    recorded = cut([LOG, recording.note(2.0, what, rc=5), LOG])
    assert (recorded.ended_by, recorded.ended_at, recorded.exit_status) == (what, 2.0, None)
    assert [type(event) for event in events(recorded)] == [EngineSpawned, LineRead]


def test_a_recording_that_breaks_off_ends_with_its_latest_row() -> None:
    recorded = cut([{"t": 4.0, "kind": "log", "line": "x"}, {"t": 3.0, "kind": "log", "line": "y"}])
    assert (recorded.ended_by, recorded.ended_at) == ("", 4.0)
    assert cut([]) == Recording(rows=(), ended_by="", ended_at=0.0)


def test_a_line_that_only_speaks_of_an_end_ends_nothing() -> None:
    assert cut([{"t": 1.0, "kind": "log", "line": "x", "what": "healthy"}]).ended_by == ""


def test_the_header_is_the_note_that_began_it_or_nothing() -> None:
    header = recording.note(0.0, "attempt", format=1)
    assert cut([header, LOG]).header == header
    assert cut([LOG]).header == {}
    assert cut([header, LOG, recording.note(2.0, "healthy")]).header == header


@pytest.mark.parametrize(
    ("rows", "has_gpus"),
    [
        ([LOG], False),
        ([{"t": 1.0, "kind": "sample", "gpus": [], "procs": [{"pid": 4}]}], False),
        ([{"t": 1.0, "kind": "sample", "gpus": [{"mem": 1}]}], True),
        ([{"t": 1.0, "kind": "unobserved", "why": "x"}], True),
    ],
)
def test_a_recording_has_gpus_if_they_were_seen_or_missed(rows: list[Row], has_gpus: bool) -> None:
    assert cut(rows).has_gpus is has_gpus


def test_events_begin_with_the_spawn_and_keep_attempt_and_time() -> None:
    sample = {"t": 1.0, "kind": "sample", "procs": [{"pid": 5072}, {"pid": 1}]}
    assert [*events(cut([LOG, sample]), attempt=7, spawned_at=100.0)][:2] == [
        EngineSpawned(at=100.0, attempt=7, pid=5072),
        LineRead(at=101.0, attempt=7, text="kept"),
    ]


@pytest.mark.parametrize("procs", [[], ["x"], [{}], [{"pid": "x"}], [{"pid": float("inf")}], 5, {"a": 1}, None])
def test_where_no_process_was_seen_the_first_one_is_unknown(procs: object) -> None:
    spawned = next(iter(events(cut([{"t": 1.0, "kind": "sample", "procs": procs}]))))
    assert spawned == EngineSpawned(at=0.0, attempt=1, pid=1)
