"""What systemd is told, as a real datagram socket receives it. The daemons run side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from mgpu_llm.core.engine_log import Phase
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, environ_of, remains, until
from tests.daemon.notified import Notified, notified

SCENARIOS: Mapping[str, str] = {
    "plain": "",
    "slow": "load_s=8",
    "mute": "mute-completion",
    "hung": "hang-init unless NCCL_P2P_DISABLE=1",
    "refused": "bad-flag",
    "wrong": "",
    "alone": "",
}
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "mute": {"serving.completion_timeout": 1},
    "wrong": {"engine.prot": 1},
    "hung": {"patience.distributed_init": 10},
}


class Told(NamedTuple):
    life: Life
    manager: Notified


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Told]]:
    with ExitStack() as stack:
        told = dict[str, Told]()
        for name, scenario in SCENARIOS.items():
            manager = stack.enter_context(notified(tmp_path_factory.mktemp(name) / "notify"))
            environ = manager.environ(1)
            if name == "alone":
                environ["NOTIFY_SOCKET"] += "-that-nobody-made"
            told[name] = Told(begin_for_module(scenario, SETTINGS.get(name), environ), manager)
        yield told


def ends_clean(life: Life) -> None:
    assert life.stop() == 0, life.log()[-3000:]
    assert remains(life.setup) == []


def test_one_life_is_told_in_order_status_and_time_then_ready_then_stopping(lives: Mapping[str, Told]) -> None:
    life, manager = lives["plain"]
    status = life.ready()
    until("a sign of life after READY", lambda: "WATCHDOG" in manager.names()[manager.first("READY=1") :])
    environ = environ_of(status["pid"])
    ends_clean(life)
    until("STOPPING", lambda: manager.has("STOPPING=1"))
    messages, ready, stopping = manager.messages, manager.first("READY=1"), manager.first("STOPPING=1")
    assert (messages.count("READY=1"), messages.count("STOPPING=1")) == (1, 1)
    assert set(manager.names()) == {"STATUS", "EXTEND_TIMEOUT_USEC", "WATCHDOG", "READY", "STOPPING"}
    assert ready < stopping
    assert messages[ready - 1] == "STATUS=ready: attempt 1 on rung base"
    before = [message for message in messages[: ready - 1] if message.startswith("STATUS=")]
    assert before
    assert all(re.match(r"STATUS=loading: [a-z-]+.*, \d+ s, attempt 1 on rung base", message) for message in before)
    assert manager.first("EXTEND_TIMEOUT_USEC") < ready
    assert "WATCHDOG" in manager.names()[:ready]
    # Time to finish its requests is asked for when the end begins.
    assert manager.names()[stopping + 1] == "EXTEND_TIMEOUT_USEC"
    assert not [message for message in messages[stopping:] if message.startswith("STATUS=ready")]
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}.isdisjoint(environ)


def test_without_a_completion_there_is_no_ready_however_healthy_the_server(lives: Mapping[str, Told]) -> None:
    life, manager = lives["mute"]
    # It asks again: so a first completion was asked for, and has not come back.
    life.wait_log('"GET /v1/models HTTP/1.1" 200', count=2)
    assert not manager.has("READY")
    assert not manager.has("STATUS=ready")
    ends_clean(life)
    until("STOPPING", lambda: manager.has("STOPPING=1"))
    assert not manager.has("READY")


def test_a_slow_load_that_moves_is_given_time_again_and_again_and_its_phases_are_told_in_order(
    lives: Mapping[str, Told],
) -> None:
    life, manager = lives["slow"]
    assert life.ready()["attempt"] == 1
    ends_clean(life)
    loading = manager.messages[: manager.first("READY=1")]
    asked_s = [int(message.partition("=")[2]) / 1e6 for message in loading if message.startswith("EXTEND_")]
    assert len(asked_s) >= 2
    # The patience, twice as where no stacks can be had, and time for the verdict, the evidence, the kill and the next spawn.
    assert asked_s[1:] == [2 * 30 + 85] * len(asked_s[1:])
    told = [found[1] for message in loading if (found := re.match(r"STATUS=loading: ([a-z-]+)", message))]
    reached = [Phase[name.upper().replace("-", "_")] for name in dict.fromkeys(told)]
    assert reached == sorted(reached)
    # The phases that take more than a second here: a shorter one may pass between two messages.
    assert {Phase.BOOT, Phase.COMPILE, Phase.WARM_UP} <= set(reached)


def test_a_stalled_load_is_not_given_more_time_until_the_next_attempt(lives: Mapping[str, Told]) -> None:
    life, manager = lives["hung"]
    life.wait_for(lambda status: status["attempt"] == 2 and status["state"] == "ready", LIMIT_S)
    ends_clean(life)
    messages = manager.messages
    quiet = [n for n, message in enumerate(messages) if re.search(r"attempt 1 .*, quiet for ([789]|1\d) s", message)]
    again = next(n for n, message in enumerate(messages) if n > quiet[0] and message.startswith("EXTEND_"))
    assert quiet[-1] < again
    assert manager.names()[quiet[0] : quiet[-1]].count("WATCHDOG") >= 2
    assert messages.count("READY=1") == 1
    assert any(message.startswith("STATUS=ready, degraded: rung p2p-off") for message in messages)


def test_a_daemon_that_gives_up_tells_the_reason_last_and_was_never_ready(lives: Mapping[str, Told]) -> None:
    life, manager = lives["refused"]
    assert life.ended() == 65
    until("the last word", lambda: manager.has("STATUS=gave up"))
    assert manager.messages[-1].startswith("STATUS=gave up: no retry can help; attempt 1 (base, ")
    assert not manager.has("READY")


def test_a_config_that_is_wrong_is_told_to_systemd_as_well(lives: Mapping[str, Told]) -> None:
    life, manager = lives["wrong"]
    assert life.ended() == 78
    until("the problem", lambda: manager.has(f"STATUS={life.setup.config_file}: engine.prot: found an unknown key"))
    assert not manager.has("READY")


def test_a_manager_that_is_gone_does_not_keep_the_daemon_from_serving(lives: Mapping[str, Told]) -> None:
    life, manager = lives["alone"]
    assert life.ready()["attempt"] == 1
    ends_clean(life)
    assert "systemd.notify.failed" in life.log() or "systemd.unreachable" in life.log()
    assert manager.messages == []
