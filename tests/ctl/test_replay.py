"""mgpuctl replay: a recorded start, judged without a daemon."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemons import MGPUCTL
from tests.support.recordings import FOLDER

HANG = FOLDER / "h100-tp2-daemon-p2p-hang.jsonl.gz"
HEALTHY = FOLDER / "h100-tp2-daemon-warm.jsonl.gz"


def replay(file: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [MGPUCTL, "replay", file, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def document(file: Path) -> dict[str, Any]:
    done = replay(file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_stall_is_told_with_its_cause_its_time_and_what_is_tried_next() -> None:
    done = replay(HANG)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].strip() == "Outcome: stalled at 79.8 s, 11.0 s after the last progress"
    assert "     Decision: step to rung p2p-off" in lines
    assert any(line.startswith("distributed-init  66.3 s") for line in lines)
    assert any(line.startswith("  VLLM::Worker") and "Stream.synchronize" in line for line in lines)


def test_a_healthy_start_is_told_with_the_time_at_which_it_served() -> None:
    assert replay(HEALTHY).stdout.splitlines()[0].strip() == "Outcome: healthy at 93.0 s"


def test_the_document_has_the_verdict_the_phases_and_the_suspicions() -> None:
    found = document(HANG)
    assert (found["outcome"], found["phase"], found["decision"]) == (
        "stalled",
        "distributed-init",
        "step to rung p2p-off",
    )
    assert found["verdict_at"] == pytest.approx(79.804)
    assert found["last_progress_at"] == pytest.approx(68.769)
    assert [phase["name"] for phase in found["phases"]] == ["boot", "distributed-init"]
    assert [suspected["phase"] for suspected in found["suspicions"]] == ["distributed-init"]
    healthy = document(HEALTHY)
    assert (healthy["verdict_at"], healthy["cause"], healthy["decision"]) == (None, None, None)


def test_a_recording_is_read_packed_and_plain_whatever_its_name_is(tmp_path: Path) -> None:
    plain = tmp_path / "anything"
    plain.write_bytes(gzip.decompress(HANG.read_bytes()))
    assert document(plain) == document(HANG)


def test_a_recording_that_is_cut_off_is_judged_as_far_as_it_goes_and_said_to_be_so(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(HANG.read_bytes()[:3000])
    done = replay(cut, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["outcome"] == "running"
    assert done.stderr == f"mgpuctl: '{cut}' is cut off; judged up to {found['ended_at']:.1f} s\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"# a text\n\nof two lines\n", "line 1 is not a row of a recording: it is no JSON"),
        (b"[1, 2]\n[3]\n", "line 1 is not a row of a recording: it is no JSON object"),
        (b'{"a": 1}\n{"a": 2}\n', 'line 1 is not a row of a recording: it has no "t" in seconds since the spawn'),
        (b'{"t": 1, "kind": "weather"}\n', "none of its rows is of a kind that recordings have"),
        (b"\xff\xfe\x00\n\x00\n", "line 1 is not a row of a recording: it is no JSON"),
        (
            b'{"t": 1, "kind": "note", "what": ["exit"]}\n' * 2,
            'line 1 is not a row of a recording: its "what" is no text',
        ),
        (gzip.compress(b'{"t":1,"kind":"host"}\n' * 1_500_000), "it is larger than any recording\n"),
        (gzip.compress((b" " * (1 << 20) + b"\n") * 256, 1), "it is larger than any recording\n"),
        (gzip.compress(b" " * (17 << 20)), "it has a line longer than any of a recording\n"),
        (HANG.read_bytes()[:20], "it is cut off before its first row"),
        (HANG.read_bytes()[:-8] + b"\0" * 8, "it is damaged: "),
        (b'{"t": 1, "kind": "sample", "procs": [{"pid": "x"}]}\n', "the sample row at t=1 has a field of a wrong type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_recording_gets_one_line_and_exit_code_2(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    done = replay(file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mgpuctl: cannot replay '{file}': {why}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("file", "why"), [("/nonexistent", "No such file or directory"), ("/proc", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(file: str, why: str) -> None:
    done = replay(file)
    assert (done.returncode, done.stderr) == (2, f"mgpuctl: cannot replay '{file}': {why}\n")


def test_what_the_engine_said_cannot_steer_the_terminal(tmp_path: Path) -> None:
    rows = [
        {"t": 0.0, "kind": "log", "line": "\x1b]0;owned\x07\x1b[2Jworld_size=2 rank=0 local_rank=0"},
        *({"t": t / 2, "kind": "sample", "procs": [{"pid": 1, "name": "\x1b[31mred"}]} for t in range(120)),
    ]
    file = tmp_path / "hostile.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = replay(file)
    assert done.returncode == 0
    assert "stalled" in done.stdout
    assert "\x1b" not in done.stdout
