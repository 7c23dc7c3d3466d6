"""A config that has changed: what holds at once, and what waits for a restart."""

from __future__ import annotations

import pytest

from mgpu_llm.config.reloading import Change, change
from mgpu_llm.config.schema import Config
from mgpu_llm.core.remedies import Area
from tests.config.loading import config

RUNNING = """
[engine]
args = ["--max-model-len", "4096"]
[gpus]
use = [0, 1]
[patience]
weights = 40
"""


def test_without_a_change_nothing_is_applied() -> None:
    assert change(config(RUNNING), config(RUNNING)) == Change(config=config(RUNNING))


@pytest.mark.parametrize(
    "setting",
    [
        "patience.weights = 41",
        "heartbeat.stacks = false",
        "serving.probe_interval = 3",
        "serving.completion_timeout = 30",
        "retries.attempts = 3",
        "stop.grace = 5",
        "daemon.log_level = 'debug'",
        "ladder.retry_up_after = 3",
        "ladder.pin = ['transports']",
        "ladder.may_change = ['dtype']",
    ],
)
def test_what_only_judges_and_decides_holds_at_once(setting: str) -> None:
    wanted = config(setting)
    key = setting.partition(" ")[0]
    assert change(Config(), wanted) == Change(config=wanted, applied=(key,))


@pytest.mark.parametrize(
    "setting",
    [
        "model.path = '/srv/other'",
        "engine.args = ['--enforce-eager']",
        "engine.env = { NCCL_DEBUG = 'INFO' }",
        "engine.port = 9000",
        "gpus.use = [0]",
        "preflight.mode = 'off'",
        "stop.kill_deadline = 60",
        "records.keep = 3",
        "incidents.keep = 3",
        "metrics.listen = 'off'",
        "daemon.state_dir = '/srv/state'",
        "ladder.remember = false",
        "ladder.rungs = []",
    ],
)
def test_what_the_engine_or_the_daemon_began_with_waits_for_a_restart(setting: str) -> None:
    key = setting.partition(" ")[0]
    assert change(Config(), config(setting)) == Change(config=Config(), needs_restart=(key,))


def test_both_together_are_told_apart_and_what_waits_is_told_again_at_the_next_reload() -> None:
    wanted = config("[engine]\nport = 9000\n[patience]\nboot = 7\nweights = 9\n[daemon]\nlog_level = 'error'\n")
    done = change(config(RUNNING), wanted)
    assert done.applied == ("patience.boot", "patience.weights", "daemon.log_level")
    assert done.needs_restart == ("engine.port", "engine.args", "gpus.use")
    assert (done.config.patience, done.config.daemon) == (wanted.patience, wanted.daemon)
    assert (done.config.engine, done.config.gpus) == (config(RUNNING).engine, config(RUNNING).gpus)
    again = change(done.config, wanted)
    assert (again.applied, again.needs_restart) == ((), done.needs_restart)


def test_an_area_that_the_settings_in_use_have_changed_is_not_taken_from_them() -> None:
    wanted = config("ladder.pin = ['transports']")
    assert change(Config(), wanted, {Area.TRANSPORTS}).needs_restart == ("ladder.pin",)
    assert change(Config(), wanted, {Area.GPUS}).applied == ("ladder.pin",)


def test_the_context_length_is_not_released_without_a_new_reckoning_of_what_fits() -> None:
    wanted = config("ladder.may_change = ['context-length']\nladder.retry_up_after = 3")
    done = change(Config(), wanted)
    assert (done.applied, done.needs_restart) == (("ladder.retry_up_after",), ("ladder.may_change",))
