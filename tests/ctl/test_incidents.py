"""mgpuctl incidents and incident: to list, to read, and to attach to a report."""

from __future__ import annotations

import json
import stat
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.control_api import status_from_json, status_to_json
from tests.ctl.daemons import SampleBackend, command, daemon, environment, foreign, http_reply, mgpuctl, says
from tests.ctl.samples import RUNNING, STALLED, STARTING

OLD = "20261124T210500Z-a1-stalled-in-weights"
NEW = "20261124T220000Z-a2-engine-exited"


def document(name: str) -> dict[str, object]:
    return {
        "id": name,
        "at": "2026-11-24T21:05:00.000+00:00",
        "attempt": 1,
        "rung": "base",
        "phase": "weights",
        "outcome": "stalled",
        "cause": "stalled-in-weights",
        "summary": "nothing moved for 26 s\x1b[31m",
        "advice": "look at the disk",
        "evidence": ["last line: x"],
        "duration_s": 41.5,
        "decision": "step down to rung tp-1",
        "recording": "r.jsonl.gz",
        "launch": {"argv": ["vllm", "serve", "m"], "environment": {}},
        "versions": {"kernel": "6.1", "vllm": "0.26.0"},
        "not_observed": {"gpus.json": "no driver"},
    }


def backend(folder: Path, *names: str) -> SampleBackend:
    found = SampleBackend()
    found.kept = Incidents(folder / "incidents", keep=20, max_bytes=1 << 20)
    for name in names:
        files = {"incident.json": json.dumps(document(name)).encode(), "engine.log": b"hello\n"}
        assert found.kept.keep(name, files)
    return found


def test_they_are_listed_with_what_happened_and_what_was_done(tmp_path: Path) -> None:
    with daemon(tmp_path, backend(tmp_path, OLD, NEW)) as socket_path:
        done = mgpuctl(socket_path, "incidents")
        listed = json.loads(mgpuctl(socket_path, "incidents", "--json").stdout)["incidents"]
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].split() == ["INCIDENT", "RUNG", "OUTCOME", "PHASE", "SIZE"]
    assert lines[1].split() == [OLD, "base", "stalled", "weights", "0.5", "KiB"]
    assert lines[2:4] == ["    nothing moved for 26 s\\x1b[31m", "    step down to rung tp-1"]
    assert [incident["id"] for incident in listed] == [OLD, NEW]


def test_without_any_there_is_a_sentence(tmp_path: Path) -> None:
    with daemon(tmp_path, backend(tmp_path)) as socket_path:
        done = mgpuctl(socket_path, "incidents")
        none = mgpuctl(socket_path, "incident", "show", "last")
    assert (done.returncode, done.stdout) == (0, "no incident is kept\n")
    assert (none.returncode, none.stdout) == (8, "")
    assert none.stderr == "mgpuctl: there is no incident 'last': none is kept\n"


def test_one_that_cannot_be_read_is_listed_all_the_same(tmp_path: Path) -> None:
    kept = backend(tmp_path, OLD, NEW)
    (tmp_path / "incidents" / OLD / "incident.json").write_text("{")
    with daemon(tmp_path, kept) as socket_path:
        done = mgpuctl(socket_path, "incidents")
        broken = mgpuctl(socket_path, "incident", "show", OLD)
    assert done.returncode == 0
    [row] = [line for line in done.stdout.splitlines() if line.startswith(OLD)]
    assert row.split() == [OLD, "?", "?", "?"]
    assert "JSONDecodeError" in done.stdout
    assert broken.returncode != 0
    assert "Traceback" not in broken.stderr


@pytest.mark.parametrize("wanted", [NEW, NEW[:14], "last"])
def test_one_is_shown_by_its_id_by_a_beginning_and_as_the_last(tmp_path: Path, wanted: str) -> None:
    with daemon(tmp_path, backend(tmp_path, OLD, NEW)) as socket_path:
        shown = mgpuctl(socket_path, "incident", "show", wanted).stdout.splitlines()
        whole = json.loads(mgpuctl(socket_path, "incident", "show", wanted, "--json").stdout)
    assert shown[0] == NEW
    told = dict(line.strip().split(": ", 1) for line in shown[1:] if ": " in line)
    assert told["Attempt"] == "1 on rung base, stalled in weights after 42 s"
    assert told["Then"] == "step down to rung tp-1"
    assert told["Versions"] == "kernel 6.1, vllm 0.26.0"
    assert told["Not seen"] == "gpus.json: no driver"
    assert told["Folder"] == str(tmp_path / "incidents" / NEW)
    assert "\x1b" not in "".join(shown)
    assert whole["files"].keys() == {"engine.log", "incident.json"}


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("2026", "'2026' begins 2 incidents, give more of it"),
        ("nothing", f"there is no incident 'nothing': there are 2, the last is {NEW}"),
        ("../records", "there is no incident '../records'"),
        ("..", "there is no incident '..'"),
        ("%2e%2e%2fincidents", "there is no incident '%2e%2e%2fincidents'"),
    ],
)
def test_what_means_none_or_several_is_refused_and_leads_nowhere_else(tmp_path: Path, wanted: str, why: str) -> None:
    with daemon(tmp_path, backend(tmp_path, OLD, NEW)) as socket_path:
        for verb in ("show", "export"):
            done = mgpuctl(socket_path, "incident", verb, wanted)
            assert (done.returncode, done.stdout) == (8, "")
            assert why in done.stderr


def test_an_export_is_one_archive_for_its_owner_alone_and_never_over_another_file(tmp_path: Path) -> None:
    with daemon(tmp_path, backend(tmp_path, OLD, NEW)) as socket_path:
        done = mgpuctl(socket_path, "incident", "export", OLD, str(tmp_path))
        again = mgpuctl(socket_path, "incident", "export", OLD, str(tmp_path))
        nowhere = mgpuctl(socket_path, "incident", "export", OLD, str(tmp_path / "no" / "x.tar.gz"))
        piped = subprocess.run(
            command("--socket", str(socket_path), "incident", "export", OLD, "-"),
            env=environment(),
            capture_output=True,
            check=True,
        )
    file = tmp_path / f"{OLD}.tar.gz"
    assert (done.returncode, done.stdout) == (0, f"{file}\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert piped.stdout == file.read_bytes()
    with tarfile.open(file) as archive:
        assert archive.getnames() == [f"{OLD}/engine.log", f"{OLD}/incident.json"]
    assert (again.returncode, again.stderr) == (8, f"mgpuctl: cannot write '{file}': file exists\n")
    assert (nowhere.returncode, "no such file or directory" in nowhere.stderr) == (8, True)


def test_status_and_attempts_name_the_incident_of_each_that_failed(tmp_path: Path) -> None:
    failed = replace(STARTING, attempts=(replace(STALLED, incident=OLD), RUNNING))
    with daemon(tmp_path, SampleBackend(failed)) as socket_path:
        for verb in ("status", "attempts"):
            lines = [line.split() for line in mgpuctl(socket_path, verb).stdout.splitlines()]
            assert [line for line in lines if line[:1] == ["kept"]] == [["kept", OLD]]


def test_a_status_of_an_older_daemon_names_none() -> None:
    document = status_to_json(replace(STARTING, attempts=(STALLED,)))
    del document["attempts"][0]["incident"]
    assert status_from_json(document).attempts == (STALLED,)


def test_without_a_daemon_it_says_where_they_are(tmp_path: Path) -> None:
    for verbs in (("incidents",), ("incident", "show", "last"), ("incident", "export", "last")):
        done = mgpuctl(tmp_path / "control.sock", *verbs)
        assert done.returncode == 3
        assert (
            "each incident is a folder in incidents/ below daemon.state_dir (/var/lib/mgpu-llm/incidents)"
            in done.stderr
        )


@pytest.mark.parametrize("reply", [b"[]", b'{"incidents": 7}', b'{"id": "../../etc/passwd"}', b"{}", b"nonsense"])
def test_answers_of_a_stranger_are_one_line_and_no_file(tmp_path: Path, reply: bytes) -> None:
    with foreign(tmp_path / "socket", says(http_reply(reply))) as socket_path:
        for verbs in (("incidents",), ("incident", "show", "last"), ("incident", "export", "last", str(tmp_path))):
            done = mgpuctl(socket_path, *verbs)
            assert done.returncode == 5, done
            assert done.stderr.startswith("mgpuctl: what answers on ")
    assert [path.name for path in tmp_path.iterdir()] == ["socket"]
