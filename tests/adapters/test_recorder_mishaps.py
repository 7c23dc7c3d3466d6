"""Recordings on disks that fail, and by daemons that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from structlog.typing import EventDict

from mgpu_llm.adapters.recorder import Recorder
from tests.adapters.test_recorder import MIB, STEM, header, names, read, record, recorder, wait_until
from tests.support.small_disk import small_disk

WRITER = """
import sys
from pathlib import Path
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.core.events import LineRead
from tests.adapters.test_recorder import header
keeper = Recorder(Path(sys.argv[1]), keep=20, max_bytes=200 << 20)
keeper.begin(1, 100.0, header())
for number in range(10 ** 9):
    keeper.take(LineRead(at=101.0 + number, attempt=1, text=f"{number} " + "x" * 3000))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_daemon_killed_in_the_middle_of_writing_leaves_a_file_that_reads_and_the_next_one_packs_it(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], env=environment()) as daemon:
        wait_until(lambda: sum(path.stat().st_size for path in tmp_path.iterdir()) > 3 * MIB)
        daemon.send_signal(signal.SIGKILL)
    (plain,) = tmp_path.iterdir()
    assert plain.name.endswith("-running.jsonl")
    plain.with_name(plain.name + ".gz.new").write_bytes(b"half packed")
    with plain.open("ab") as file:
        file.write(b'{"t":1.0,"kind":"lo')
    found = read(plain)
    assert len(found.lines) > 500
    recorder(tmp_path).close(60)
    (packed,) = tmp_path.iterdir()
    assert packed.name == plain.name.replace("-running.jsonl", "-cut.jsonl.gz")
    assert read(packed) == found
    assert logged == []


def test_on_a_full_disk_it_is_said_once_what_was_written_reads_and_the_next_attempt_tries_again(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    with small_disk(tmp_path) as disk:
        keeper = recorder(disk.folder)
        record(keeper, 1, *(f"{number} {'x' * 3000}" for number in range(900)))
        wait_until(lambda: any("stalled" in name for name in names(disk.folder)))
        assert [(told["event"], told["log_level"], told["attempt"], told["reason"]) for told in logged] == [
            ("record.failed", "warning", 1, "cannot write the recording: no space left on device")
        ]
        (file,) = disk.folder.iterdir()
        assert read(file).header["rung"] == "p2p-off"
        assert len(read(file).lines) > 100
        file.unlink()
        record(keeper, 2, "loading")
        keeper.close()
        assert names(disk.folder) == [f"{STEM}-a2-p2p-off-stalled.jsonl.gz"]
        assert len(logged) == 1


def test_on_a_read_only_disk_or_where_the_folder_cannot_be_it_is_said_once_an_attempt(
    tmp_path: Path, logged: list[EventDict]
) -> None:
    (tmp_path / "file").touch()
    keeper = recorder(tmp_path / "file" / "records")
    record(keeper, 1, "loading")
    record(keeper, 2, "loading")
    keeper.close()
    assert [told["attempt"] for told in logged] == [1, 2]
    assert "not a directory" in logged[0]["reason"]
    with small_disk(tmp_path) as disk:
        disk.read_only()
        keeper = recorder(disk.folder / "records")
        record(keeper, 1, "loading")
        keeper.close()
        assert "read-only file system" in logged[2]["reason"]


def test_a_folder_that_is_removed_meanwhile_is_said_and_made_anew(tmp_path: Path, logged: list[EventDict]) -> None:
    folder = tmp_path / "records"
    keeper = recorder(folder)
    keeper.begin(1, 100.0, header())
    wait_until(folder.exists)
    wait_until(lambda: bool(names(folder)))
    subprocess.run(["rm", "-r", folder], check=True)
    keeper.end("ready", [])
    record(keeper, 2)
    keeper.close()
    assert names(folder) == [f"{STEM}-a2-p2p-off-stalled.jsonl.gz"]
    (told,) = logged
    assert "no such file or directory" in told["reason"]


def test_a_row_that_cannot_be_written_ends_its_recording_and_no_other(tmp_path: Path, logged: list[EventDict]) -> None:
    keeper = recorder(tmp_path)
    keeper.begin(1, 100.0, header())
    keeper.end("ready", [{"t": 1.0, ("no", "name"): 1}])  # type: ignore[dict-item]
    record(keeper, 2, "loading")
    keeper.close()
    assert names(tmp_path)[-1] == f"{STEM}-a2-p2p-off-stalled.jsonl.gz"
    (told,) = logged
    assert told["reason"].startswith("a fault of the recorder: TypeError: ")


def begun_at(folder: Path, moment: datetime, attempt: int, *, keep: int = 3) -> None:
    keeper = Recorder(folder, keep=keep, max_bytes=200 * MIB, now=lambda: moment)
    record(keeper, attempt, "loading")
    keeper.close()


def test_the_newest_recording_is_the_last_to_go_whatever_the_wall_clock_does(tmp_path: Path) -> None:
    for attempt, year in enumerate((2026, 1970, 2099, 2026, 2026), start=1):
        begun_at(tmp_path, datetime(year, 11, 24, 10, 0, tzinfo=UTC), attempt)
    assert names(tmp_path) == [
        "20991124T100000Z-a3-p2p-off-stalled.jsonl.gz",
        "20991124T100001Z-a4-p2p-off-stalled.jsonl.gz",
        "20991124T100002Z-a5-p2p-off-stalled.jsonl.gz",
    ]


def test_of_ten_attempts_within_one_second_the_last_are_kept(tmp_path: Path) -> None:
    for attempt in range(8, 12):
        begun_at(tmp_path, datetime(2026, 11, 24, 21, 5, tzinfo=UTC), attempt, keep=2)
    assert [name.split("-")[1] for name in names(tmp_path)] == ["a10", "a11"]


def test_what_is_named_by_a_time_that_there_is_not_is_left_alone(tmp_path: Path) -> None:
    foreign = ["20261399T999999Z-a1-base-ready.jsonl.gz", "99991231T235959Z-a1-base-ready.jsonl.gz"]
    for name in foreign:
        (tmp_path / name).touch()
    for attempt in (1, 2):
        begun_at(tmp_path, datetime(2026, 11, 24, 21, 5, tzinfo=UTC), attempt, keep=1)
    assert names(tmp_path) == sorted([f"{STEM}-a2-p2p-off-stalled.jsonl.gz", *foreign])


def test_what_is_in_the_way_of_one_leftover_keeps_from_no_other(tmp_path: Path, logged: list[EventDict]) -> None:
    for attempt in (1, 2):
        (tmp_path / f"{STEM}-a{attempt}-base-running.jsonl").write_text('{"t":0,"kind":"log","line":"x"}\n')
    (tmp_path / f"{STEM}-a1-base-cut.jsonl.gz.new").mkdir()
    (tmp_path / f"{STEM}-a0-base-cut.jsonl.gz.new").mkdir()
    (tmp_path / f"{STEM}-a3-base-cut.jsonl.gz.new").write_text("half packed")
    recorder(tmp_path).close(60)
    assert names(tmp_path) == [
        f"{STEM}-a0-base-cut.jsonl.gz.new",
        f"{STEM}-a1-base-cut.jsonl",
        f"{STEM}-a1-base-cut.jsonl.gz.new",
        f"{STEM}-a2-base-cut.jsonl.gz",
    ]
    (told,) = logged
    assert told["reason"].endswith(f"'{tmp_path}/{STEM}-a1-base-cut.jsonl.gz.new': is a directory")


def test_a_link_in_the_place_of_what_is_being_packed_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    precious.chmod(0o604)
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / f"{STEM}-a1-base-running.jsonl").write_text('{"t":0,"kind":"log","line":"x"}\n')
    (folder / f"{STEM}-a1-base-cut.jsonl.gz.new").symlink_to(precious)
    recorder(folder).close(60)
    assert names(folder) == [f"{STEM}-a1-base-cut.jsonl.gz"]
    assert (precious.read_text(), precious.stat().st_mode & 0o777) == ("mine", 0o604)
    assert read(folder / f"{STEM}-a1-base-cut.jsonl.gz").lines == ("x",)


def test_a_leftover_longer_than_any_recording_stays_plain_and_costs_the_new_load_no_rows(tmp_path: Path) -> None:
    left = tmp_path / f"{STEM}-a1-p2p-off-running.jsonl"
    left.touch()
    os.truncate(left, 8 << 30)  # without a block on the disk, but a minute's work for gzip
    keeper = recorder(tmp_path, max_bytes=16 << 30)
    record(keeper, 2, *map(str, range(9000)))
    keeper.close(60)
    plain, packed = sorted(tmp_path.iterdir())
    assert plain.name == f"{STEM}-a1-p2p-off-cut.jsonl"
    assert read(packed).lines == tuple(map(str, range(9000)))


def test_packing_that_takes_long_does_not_hold_up_the_end(tmp_path: Path) -> None:
    left = tmp_path / f"{STEM}-a1-p2p-off-running.jsonl"
    left.write_bytes(os.urandom(64 << 20))
    code = "import sys; from pathlib import Path; from mgpu_llm.adapters.recorder import Recorder;"
    code += "Recorder(Path(sys.argv[1]), keep=20, max_bytes=200 << 20).close(0.2); print('ended')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(), capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"ended\n"), done.stderr
    assert f"{STEM}-a1-p2p-off-cut.jsonl" in names(tmp_path)
