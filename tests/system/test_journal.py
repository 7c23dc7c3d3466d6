"""What is said to a real journald: fields, explanations, and what becomes of it while journald is stopped, gone or on its way
back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mgpu_llm.core.journal_fields import MESSAGE_IDS
from tests.support.booted_systemd import CHECKOUT, BootedSystemd

pytestmark = pytest.mark.system
DEADLINE_S = 60.0
#: Speaks as mgpud does; `until` is a file that ends it. It says by how long at most a line held it up.
SPEAKER = r"""
import os, pathlib, sys, time
import structlog
from mgpu_llm.adapters import journal

journal.configure("debug", os.environ, sys.stderr)
journal.about({"attempt": 3, "rung": "p2p-off", "phase": "weights"})
log = structlog.get_logger()
journal.engine_line("Worker_TP1", "a warning of the engine", "WARNING", 3)
log.error("engine.stalled", attempt=3, cause="nccl-p2p", summary="nothing moved for 11 s", incident="20261125T100000Z-a3-x")
log.warning("record.failed", reason="x" * 2_000_000)
until, longest, number = pathlib.Path(sys.argv[1]), 0.0, 0
while not until.exists():
    number += 1
    begun = time.monotonic()
    log.info("counted", number=number)
    longest = max(longest, time.monotonic() - begun)
    pathlib.Path(os.environ["RUNTIME_DIRECTORY"], "number").write_text(str(number))
    time.sleep(0.005)
log.info("last.words", number=number, longest_s=longest)
"""


def wait_for(met: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + DEADLINE_S
    while not met():
        assert time.monotonic() < ends, f"never came: {what}"
        time.sleep(0.02)


def install(booted: BootedSystemd, name: str, start: str) -> None:
    unit = f"[Service]\nExecStart={start}\nUser=daemon\nRuntimeDirectory={name}\nEnvironment=PYTHONPATH={CHECKOUT}/daemon\n"
    booted.write(f"/etc/systemd/system/{name}.service", unit)
    booted.must("systemctl", "daemon-reload")


def said(booted: BootedSystemd, unit: str, *options: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in booted.journal(unit, "-o", "json", "--all", *options).splitlines()]


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A machine with the catalogue, on which somebody has spoken while journald went through everything. Of the lines in
    `at_its_end`, journald was told while it was ended for good: what it had not read yet ended with it."""

    machine: BootedSystemd
    at_its_end: range


@pytest.fixture(scope="module")
def story(booted: BootedSystemd) -> Spoken:
    catalogue = (CHECKOUT / "packaging/systemd/mgpu-llm.catalog").read_text()
    booted.write("/usr/local/lib/systemd/catalog/mgpu-llm.catalog", catalogue)
    booted.must("journalctl", "--update-catalog")
    booted.write("/usr/local/lib/speaker.py", SPEAKER)
    install(booted, "speaker", f"{sys.executable} /usr/local/lib/speaker.py /run/end")
    booted.must("systemctl", "start", "speaker")

    def number() -> int:
        path = booted.root / "run/speaker/number"
        return int(path.read_text() or 0) if path.exists() else 0

    def speaks_on(count: int = 20) -> None:
        """So many lines more."""
        wanted = max(number(), 1) + count
        wait_for(lambda: number() >= wanted, f"line {wanted}")

    speaks_on()
    booted.must("systemctl", "restart", "systemd-journald")
    speaks_on()
    booted.must("systemctl", "kill", "-s", "STOP", "systemd-journald")
    speaks_on(100)  # more than its queue holds
    booted.must("systemctl", "kill", "-s", "CONT", "systemd-journald")
    speaks_on()
    sockets = ("systemd-journald.socket", "systemd-journald-dev-log.socket")
    first = number() + 1
    booted.must("journalctl", "--sync")
    booted.must("systemctl", "stop", *sockets, "systemd-journald.service")
    at_its_end = range(first, number() + 2)
    gone = booted.show("systemd-journald.socket", "ActiveState")["ActiveState"]
    speaks_on()
    booted.must("systemctl", "start", *sockets, "systemd-journald.service")
    speaks_on()
    booted.write("/run/end", "")
    wait_for(lambda: booted.show("speaker", "ActiveState")["ActiveState"] == "inactive", "the end of the speaker")
    assert gone == "inactive"
    return Spoken(machine=booted, at_its_end=at_its_end)


@pytest.fixture
def spoken(story: Spoken) -> BootedSystemd:
    return story.machine


def test_lines_have_their_fields_and_what_is_large_arrives_whole(spoken: BootedSystemd) -> None:
    engine, stalled, large = said(spoken, "speaker", "SYSLOG_IDENTIFIER=mgpud", "_TRANSPORT=journal")[:3]
    assert engine["MESSAGE"] == "engine[Worker_TP1] a warning of the engine"
    assert (engine["PRIORITY"], engine["MGPU_PROCESS"], engine["MGPU_RANK"]) == ("4", "Worker_TP1", "1")
    assert stalled["MESSAGE"].startswith("engine.stalled attempt=3 cause=nccl-p2p summary=")
    assert (stalled["PRIORITY"], stalled["SYSLOG_IDENTIFIER"]) == ("3", "mgpud")
    assert stalled["MESSAGE_ID"] == MESSAGE_IDS["engine.stalled"]
    fields = ("EVENT", "ATTEMPT", "PHASE", "CAUSE", "RUNG", "INCIDENT")
    assert [stalled[f"MGPU_{name}"] for name in fields] == [
        "engine.stalled", "3", "weights", "nccl-p2p", "p2p-off", "20261125T100000Z-a3-x",
    ]  # fmt: skip
    assert large["MGPU_REASON"] == "x" * 2_000_000


def test_nothing_is_lost_by_a_journald_that_restarts_stops_or_is_gone_and_nobody_waits_for_it(
    story: Spoken,
) -> None:
    spoken = story.machine
    counted = [int(entry["MGPU_NUMBER"]) for entry in said(spoken, "speaker", "MGPU_EVENT=counted")]
    [last] = said(spoken, "speaker", "MGPU_EVENT=last.words")
    assert sorted(set(counted)) == counted
    lost = set(range(1, int(last["MGPU_NUMBER"]) + 1)) - set(counted)
    assert lost <= set(story.at_its_end)
    assert float(last["MGPU_LONGEST_S"]) < 5, "journald was stopped or gone for longer than that, or it proves nothing"


def test_journalctl_explains_the_event_in_place(spoken: BootedSystemd) -> None:
    told = spoken.journal("speaker", "-x", f"MESSAGE_ID={MESSAGE_IDS['engine.stalled']}")
    assert "Subject: The engine stalled (nccl-p2p) in attempt 3" in told
    assert "mgpuctl plan --cause nccl-p2p" in told
    assert "systemctl reload speaker.service" in told


def test_mgpuctl_shows_one_rank_and_the_daemon_apart(spoken: BootedSystemd) -> None:
    def logs(*words: str) -> list[str]:
        done = spoken.must(str(CHECKOUT / ".venv/bin/mgpuctl"), "logs", "--unit", "speaker", "--since", "-1h", *words)
        return [line[16:] for line in done.splitlines()]

    assert logs("--rank", "1") == logs("--engine") == ["engine[Worker_TP1] a warning of the engine"]
    assert "engine.stalled attempt=3" in logs("--daemon")[0]
    assert any("Started speaker.service" in line for line in logs())


def test_a_daemon_that_cannot_start_says_why_in_one_entry_of_its_unit(spoken: BootedSystemd) -> None:
    places = '[daemon]\nruntime_dir = "/run/hopeless"\nstate_dir = "/run/hopeless/state"\n'
    spoken.write("/etc/hopeless.toml", f'[model]\npath = "/none"\nprot = 1\n[gpus]\nuse = "none"\n{places}')
    install(spoken, "hopeless", f"{sys.executable} -m mgpu_llm --config /etc/hopeless.toml")
    spoken.must("systemctl", "start", "hopeless")
    wait_for(lambda: spoken.show("hopeless", "ActiveState")["ActiveState"] == "failed", "the end of mgpud")
    [told] = said(spoken, "hopeless", f"MESSAGE_ID={MESSAGE_IDS['config.wrong']}")
    assert "model.prot: found an unknown key" in told["MESSAGE"]
    assert (told["PRIORITY"], told["MGPU_EXIT_STATUS"], told["MGPU_SOURCE"]) == ("3", "78", "daemon")
