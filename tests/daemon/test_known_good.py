"""The rung that served is where the next life begins, for as long as nothing that it depends on has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.daemon.lives import Life, causes, fact, living
from tests.support.fake_setup import FakeSetup

#: As on a host whose peer-to-peer traffic is broken.
BROKEN = "hang-init unless NCCL_P2P_DISABLE=1"
SHORT: Mapping[str, object] = {"patience.distributed_init": 2}
AT_ONCE = ["rung.remembered", "engine.starting", "engine.ready", "engine.degraded"]


class First(NamedTuple):
    """The first life of a host, which found that peer-to-peer hangs, and what it left."""

    setup: FakeSetup
    life: Life
    status: dict[str, Any]
    kept: str


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    setup = FakeSetup(folder=tmp_path_factory.mktemp("host"), scenario=BROKEN, settings=SHORT)
    life, status = lived(setup, "first")
    return First(setup, life, status, (setup.state_dir / "known-good.json").read_text())


@pytest.fixture
def host(first: First) -> FakeSetup:
    """The host after its first life: the lives under it have one state folder."""
    (first.setup.state_dir / "known-good.json").write_text(first.kept)
    return first.setup


def known_good(host: FakeSetup) -> dict[str, Any]:
    """What is remembered; empty where nothing is."""
    file = host.state_dir / "known-good.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def lived(host: FakeSetup, name: str, environ: Mapping[str, str] | None = None) -> tuple[Life, dict[str, Any]]:
    """One life, from its begin to a requested end soon after READY, and its status as it served."""
    with living(host, environ, log=name) as life:
        status = life.ready()
        life.process.terminate()
        assert life.ended() == 0
    return life, status


def rungs(status: Mapping[str, Any]) -> list[str]:
    """Of every attempt in order."""
    return [attempt["rung"] for attempt in status["attempts"]]


def test_a_rung_that_has_come_to_service_is_remembered_with_cause_and_date(first: First) -> None:
    assert rungs(first.status) == ["base", "p2p-off"]
    ((_, outcome, cause),) = causes(first.status)
    assert outcome == "stalled"
    kept = json.loads(first.kept)
    assert (kept["rung"], kept["cause"], kept["starts"]) == ("p2p-off", cause, 0)
    since = datetime.strptime(kept["since"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs(datetime.now(UTC) - since) < timedelta(hours=1)
    assert first.life.told("rung.remembered") == []


def test_the_next_life_serves_with_its_first_attempt_on_the_rung_that_served_and_says_so(host: FakeSetup) -> None:
    kept = known_good(host)
    second, status = lived(host, "second")
    assert rungs(status) == ["p2p-off"]
    assert second.story()[: len(AT_ONCE)] == AT_ONCE
    (told,) = second.told("rung.remembered")
    assert [fact(told, name) for name in ("rung", "since", "cause")] == ["p2p-off", kept["since"], kept["cause"]]
    (degraded,) = second.told("engine.degraded")
    assert fact(degraded, "since") == kept["since"]
    assert known_good(host) == {**kept, "starts": 1}


def test_a_rung_is_forgotten_at_once_where_what_it_depends_on_has_changed(host: FakeSetup) -> None:
    kept = known_good(host)
    changed = replace(host, settings={**SHORT, "engine.args": ["--max-model-len", "512"]})
    with living(changed, log="killed") as life:
        life.wait_log("engine.phase phase=distributed-init")
        (told,) = life.told("rung.forgotten")
        assert (fact(told, "rung"), fact(told, "since")) == ("p2p-off", kept["since"])
        assert " -> " in fact(told, "changed")
        assert known_good(host) == {}
        life.process.kill()
        life.process.wait()
    # With the old settings again: what was forgotten stays so.
    again, status = lived(host, "again")
    assert rungs(status) == ["base", "p2p-off"]
    assert again.told("rung.remembered") == again.told("rung.forgotten") == []
    assert known_good(host)["rung"] == "p2p-off"


def test_a_rung_that_the_admin_has_forbidden_since_is_forgotten(host: FakeSetup) -> None:
    forbidden = replace(host, scenario="", settings={**SHORT, "ladder.pin": ["transports"]})
    life, status = lived(forbidden, "forbidden")
    assert rungs(status) == ["base"]
    (told,) = life.told("rung.forgotten")
    assert fact(told, "rung") == "p2p-off"
    assert known_good(host) == {}


def test_a_damaged_file_costs_one_warning_and_the_way_down_once_more(host: FakeSetup) -> None:
    file = host.state_dir / "known-good.json"
    file.write_text(file.read_text()[:50])
    life, status = lived(host, "second")
    assert rungs(status) == ["base", "p2p-off"]
    (told,) = life.told("state.broken")
    assert fact(told, "moved_to") == f"{file}.broken"
    assert life.told("rung.remembered") == life.told("rung.forgotten") == []
    assert known_good(host)["rung"] == "p2p-off"
    _, status = lived(host, "third")
    assert rungs(status) == ["p2p-off"]


def test_a_daemon_that_is_killed_while_it_loads_loses_nothing(host: FakeSetup) -> None:
    kept = known_good(host)
    with living(host, log="killed") as life:
        life.wait_log("engine.phase")
        life.process.kill()
        life.process.wait()
    assert known_good(host)["rung"] == "p2p-off"
    life, status = lived(host, "third")
    assert rungs(status) == ["p2p-off"]
    assert fact(life.told("rung.remembered")[0], "since") == kept["since"]


def test_one_rung_up_is_tried_once_when_it_is_due_and_the_answer_remembered(tmp_path: Path) -> None:
    settings = {**SHORT, "ladder.retry_up_after": 2, "engine.env.FAKE_ENGINE": None}
    host = FakeSetup(folder=tmp_path, settings=settings)
    broken, mended = {"FAKE_ENGINE": f"load_s=0.3; {BROKEN}"}, {"FAKE_ENGINE": "load_s=0.3"}
    lived(host, "first", broken)
    since = known_good(host)["since"]
    _, status = lived(host, "second", broken)
    assert rungs(status) == ["p2p-off"]
    # Due: it fails once more, and that costs one attempt.
    third, status = lived(host, "third", broken)
    assert rungs(status) == ["base", "p2p-off"]
    assert "base" in fact(third.told("rung.remembered")[0], "trying")
    assert known_good(host)["since"] == since
    _, status = lived(host, "fourth", broken)
    assert rungs(status) == ["p2p-off"]
    # Due again, and by now the host has been mended: the base serves, and nothing is left to remember.
    _, status = lived(host, "fifth", mended)
    assert rungs(status) == ["base"]
    assert known_good(host) == {}
    sixth, _ = lived(host, "sixth", mended)
    assert sixth.told("rung.remembered") == []


def test_a_daemon_that_is_killed_in_such_a_trial_does_not_try_again_until_it_is_due(host: FakeSetup) -> None:
    host = replace(host, settings={**SHORT, "ladder.retry_up_after": 2})
    lived(host, "second")
    assert known_good(host)["starts"] == 1
    with living(host, log="killed") as life:
        life.wait_log("engine.phase phase=distributed-init")
        assert "trying=" in life.told("rung.remembered")[0]
        life.process.kill()
        life.process.wait()
    _, status = lived(host, "fourth")
    assert rungs(status) == ["p2p-off"]


def test_without_remembering_nothing_is_read_or_written_and_a_restart_still_begins_where_it_served(
    host: FakeSetup,
) -> None:
    file = host.state_dir / "known-good.json"
    kept = file.read_bytes()
    host = replace(host, settings={**SHORT, "ladder.remember": False})
    with living(host, log="second") as life:
        assert rungs(life.ready()) == ["base", "p2p-off"]
        assert life.ctl("restart").returncode == 0
        life.wait_log("engine.ready", 2)
        assert rungs(life.status()) == ["base", "p2p-off", "p2p-off"]
        assert fact(life.told("rung.remembered")[0], "rung") == "p2p-off"
        life.process.terminate()
        assert life.ended() == 0
    assert file.read_bytes() == kept
