"""logs: from the daemon's memory, and from the journal through a journalctl that keeps what it was asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import pytest

from mgpu_llm.core import instances
from mgpu_llm.ctl import journal as journal_module
from mgpu_llm.ctl import main as main_module
from mgpu_llm.ctl.client import Client
from tests.ctl.daemons import DEADLINE_S, SampleBackend, command, daemon, environment, mgpuctl

#: 2026-11-25 10:00:00 UTC.
AT_US = 1795600800_000000
STALLED = {"__REALTIME_TIMESTAMP": str(AT_US), "PRIORITY": "3", "MESSAGE": "engine.stalled attempt=1"}
SPOKE = {"__REALTIME_TIMESTAMP": str(AT_US + 5_000_000), "PRIORITY": "6", "MESSAGE": "engine[Worker_TP1] \u00e4"}
ENGINE_LINES = (
    "(Worker_TP0 pid=70) INFO 11-25 10:00:00 [a.py:1] zero",
    "(Worker_TP1 pid=71) INFO 11-25 10:00:00 [a.py:1] one",
    "plain",
    "(Worker_TP1 pid=71) two",
)


class Journalctl:
    """Stands in for journalctl in this process's mgpuctl: prints entries, keeps its arguments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self.file = folder / "journal" / "0123" / "system.journal"
        self.file.parent.mkdir(parents=True)
        self.file.touch()
        monkeypatch.setattr(journal_module, "FOLDERS", (folder / "none", folder / "journal"))
        monkeypatch.setattr(main_module, "_drop_stdout", lambda: None)
        monkeypatch.setenv("TZ", "UTC")
        self.prints()

    def prints(self, *entries: Mapping[str, object], complaint: str = "", status: int = 0) -> None:
        script = self.folder / "journalctl"
        lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        script.write_text(
            f"#!{sys.executable}\nimport json, pathlib, sys\n"
            f"pathlib.Path({str(self.folder / 'asked')!r}).write_text(json.dumps(sys.argv[1:]))\n"
            f"sys.stdout.write({lines!r})\nsys.stderr.write({complaint!r})\nsys.exit({status})\n"
        )
        script.chmod(0o755)
        self._monkeypatch.setattr(journal_module, "JOURNALCTL", str(script))

    @property
    def asked(self) -> list[str]:
        return [str(word) for word in json.loads((self.folder / "asked").read_text())]

    def logs(self, *words: str, socket: Path | None = None) -> int:
        argv = ["mgpuctl", "--socket", str(socket or self.folder / "none.sock"), "logs", *words]
        self._monkeypatch.setattr(sys, "argv", argv)
        return main_module.main()


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journalctl:
    return Journalctl(tmp_path, monkeypatch)


def test_one_ranks_lines_are_had_from_the_daemon_too(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.lines = ENGINE_LINES
    with daemon(tmp_path, backend) as socket_path:
        assert mgpuctl(socket_path, "logs", "--rank", "1").stdout.splitlines() == [ENGINE_LINES[1], ENGINE_LINES[3]]
        assert mgpuctl(socket_path, "logs", "--rank", "1", "-n", "1").stdout.splitlines() == [ENGINE_LINES[3]]
        assert mgpuctl(socket_path, "logs", "--engine").stdout.splitlines() == list(ENGINE_LINES)
        silent = mgpuctl(socket_path, "logs", "--rank", "7")
    assert (silent.returncode, silent.stdout) == (0, "")
    assert silent.stderr == "mgpuctl: the worker of rank 7 has printed nothing yet\n"


def test_since_shows_what_engine_and_daemon_have_said(
    journalctl: Journalctl, capsys: pytest.CaptureFixture[str]
) -> None:
    journalctl.prints(STALLED, SPOKE)
    assert journalctl.logs("--since", "-1h", "--unit", "mgpu-llm@a") == 0
    stamps = [f"{datetime.fromtimestamp(at).astimezone():%b %d %H:%M:%S}" for at in (AT_US / 1e6, AT_US / 1e6 + 5)]
    assert capsys.readouterr().out.splitlines() == [
        f"{stamps[0]} engine.stalled attempt=1",
        f"{stamps[1]} engine[Worker_TP1] \u00e4",
    ]
    assert {"--unit=mgpu-llm@a", "--output=json", "--since=-1h", "--lines=all", "--all"} <= set(journalctl.asked)
    assert "--follow" not in journalctl.asked


@pytest.mark.parametrize(
    ("words", "asked", "matches"),
    [
        (["--daemon"], "--lines=50", ["MGPU_SOURCE=daemon"]),
        (["--daemon", "-n", "3"], "--lines=3", ["MGPU_SOURCE=daemon"]),
        (["-f", "--engine"], "--follow", ["MGPU_SOURCE=engine"]),
        (["-f", "--rank", "1"], "--lines=50", ["MGPU_RANK=1"]),
        (
            ["--since", "today", "-n", "9", "--engine", "--rank", "0"],
            "--lines=9",
            ["MGPU_SOURCE=engine", "MGPU_RANK=0"],
        ),
    ],
)
def test_journalctl_is_asked_by_fields(
    journalctl: Journalctl, words: list[str], asked: str, matches: list[str]
) -> None:
    assert journalctl.logs(*words, "--unit", "u") == 0
    assert asked in journalctl.asked
    assert [word for word in journalctl.asked if not word.startswith("--")] == matches


def test_odd_messages_are_shown_and_cannot_steer_a_terminal(
    journalctl: Journalctl, capsys: pytest.CaptureFixture[str]
) -> None:
    at = {"__REALTIME_TIMESTAMP": str(AT_US)}
    journalctl.prints(
        {**at, "MESSAGE": "cannot use the config:\n  a.b: wrong"},
        {**at, "MESSAGE": [27, 91, 255]},
        {**at, "MESSAGE": None},
    )
    assert journalctl.logs("--daemon", "--unit", "u") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[16:] for line in lines] == ["cannot use the config:", "  a.b: wrong", "\\x1b[\ufffd", ""]
    assert lines[1][:16].strip() == ""


def test_a_journal_without_such_a_line_is_remarked(journalctl: Journalctl, capsys: pytest.CaptureFixture[str]) -> None:
    assert journalctl.logs("--daemon", "--unit", "u") == 0
    assert capsys.readouterr() == ("", "mgpuctl: the journal of u has no such line\n")


def test_what_journalctl_complains_of_is_said(journalctl: Journalctl, capsys: pytest.CaptureFixture[str]) -> None:
    journalctl.prints(complaint="Failed to parse timestamp: soon\n", status=1)
    assert journalctl.logs("--since", "soon", "--unit", "u") == 8
    assert capsys.readouterr().err == "mgpuctl: cannot read the journal: Failed to parse timestamp: soon\n"


def test_who_may_not_read_the_journal_is_told_the_group(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journalctl.file.unlink()  # root may read whatever is there
    assert journalctl.logs("-f", "--unit", "u") == 4
    assert "usermod -aG systemd-journal USER" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["journal", "journalctl"])
def test_where_there_is_no_journal_the_way_without_one_is_named(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    if lacking == "journal":
        monkeypatch.setattr(journal_module, "FOLDERS", (journalctl.folder / "none",))
    else:
        monkeypatch.setattr(journal_module, "JOURNALCTL", str(journalctl.folder / "none"))
    assert journalctl.logs("-f", "--unit", "u") == 8
    said = capsys.readouterr().err
    assert said.startswith(
        "mgpuctl: cannot read the journal: there is none on this host; mgpuctl logs without --follow"
    )


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/mgpu-llm.service\n", "mgpu-llm.service"),
        ("1:name=systemd:/system.slice/mgpu-llm@a.service/daemon\n0::/\n", "mgpu-llm@a.service"),
    ],
)
def test_the_unit_is_that_of_the_daemon_on_the_socket(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch, cgroup: str, unit: str
) -> None:
    monkeypatch.setattr(journal_module, "PROC", journalctl.folder / "proc")
    (journalctl.folder / "proc" / str(os.getpid())).mkdir(parents=True)
    (journalctl.folder / "proc" / str(os.getpid()) / "cgroup").write_text(cgroup)
    with daemon(journalctl.folder, SampleBackend()) as socket_path:
        assert journalctl.logs("--daemon", socket=socket_path) == 0
        Client(str(socket_path)).status()  # by its answer the daemon has seen that the caller before has left
    assert f"--unit={unit}" in journalctl.asked


def test_a_daemon_that_is_no_unit_has_no_journal(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal_module, "PROC", journalctl.folder / "proc")
    with daemon(journalctl.folder, SampleBackend()) as socket_path:
        assert journalctl.logs("--daemon", socket=socket_path) == 8
        Client(str(socket_path)).status()
    assert "is no unit of systemd" in capsys.readouterr().err


def test_without_a_daemon_the_usual_place_has_the_usual_unit_and_another_has_to_be_named(
    journalctl: Journalctl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instances, "RUNTIME", journalctl.folder)
    for unit in ("mgpu-llm", "mgpu-llm@big"):
        assert journalctl.logs("--daemon", socket=journalctl.folder / unit / "control.sock") == 0
        assert f"--unit={unit}.service" in journalctl.asked
    assert journalctl.logs("--daemon", socket=journalctl.folder / "other.sock") == 3
    assert "say it with --unit UNIT" in capsys.readouterr().err


def test_ranks_are_the_engines(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "logs", "--daemon", "--rank", "1")
    assert done.returncode == 2
    assert "--daemon and --rank exclude each other" in done.stderr


def following(folder: Path, end: Callable[[subprocess.Popen[str]], object]) -> tuple[int, list[str], str]:
    """`mgpuctl logs -f` as a program of its own, beside a journalctl that follows until it is ended; what came of it, and the
    journalctl's last word."""
    script = folder / "journalctl"
    script.write_text(
        "#!/bin/sh\n"
        f"trap 'echo ended >{folder}/ended; exit 0' TERM INT PIPE\n"
        f"echo '{json.dumps(STALLED)}'\nwhile :; do sleep 0.05; echo '{json.dumps(SPOKE)}'; done\n"
    )
    script.chmod(0o755)
    (folder / "journal/0123").mkdir(parents=True)
    (folder / "journal/0123/system.journal").touch()
    patched = (
        "import sys, pathlib\nfrom mgpu_llm.ctl import journal, main\n"
        f"journal.FOLDERS = (pathlib.Path({str(folder / 'journal')!r}),)\nsys.exit(main.main())\n"
    )
    argv = [sys.executable, "-c", patched, *command("logs", "-f", "--unit", "u")[3:]]
    env = {**environment(), "PATH": f"{folder}:{os.environ['PATH']}"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        end(process)
        status = process.wait(DEADLINE_S)
        assert process.stderr.read().strip() == ""  # click ends the line in which ^C stands
    return status, lines, (folder / "ended").read_text()


def test_following_shows_each_line_at_once_and_ctrl_c_ends_journalctl_too(tmp_path: Path) -> None:
    status, lines, last = following(tmp_path, lambda process: process.send_signal(signal.SIGINT))
    assert status == 130
    assert lines[0].endswith("engine.stalled attempt=1\n")
    assert "engine[Worker_TP1]" in lines[1]
    assert last == "ended\n"


def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path: Path) -> None:
    status, _, last = following(tmp_path, lambda process: process.stdout and process.stdout.close())
    assert status == 141
    assert last == "ended\n"
