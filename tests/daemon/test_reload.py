"""A config that is changed while the daemon runs, and read again."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from mgpu_llm.ctl import exits
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, argv_of, fact, remains, until

HANGS = "hang-init unless attempt>=2"


class Lives(NamedTuple):
    """They run side by side from the beginning of the module."""

    hung: Life
    serving: Life
    degraded: Life


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin) -> Lives:
    return Lives(
        hung=begin_for_module(HANGS, {"patience.distributed_init": 600}),
        serving=begin_for_module(),
        degraded=begin_for_module("hang-init unless NCCL_P2P_DISABLE=1", {"patience.distributed_init": 2}),
    )


def edit(life: Life, settings: Mapping[str, object]) -> None:
    setup = replace(life.setup, settings={**life.setup.settings, **settings})
    setup.config_file.write_text(setup.toml(), encoding="utf-8")


def reloaded(life: Life) -> dict[str, Any]:
    done = life.ctl("reload", "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_shorter_patience_ends_a_hang_that_is_under_way_and_a_replay_tells_the_same(lives: Lives) -> None:
    life = lives.hung
    life.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)
    edit(life, {"patience.distributed_init": 2})
    assert reloaded(life) == {"applied": ["patience.distributed_init"], "needs_restart": []}
    assert life.ready()["attempt"] == 2
    [stalled] = life.told("engine.stalled")
    records = life.setup.state_dir / "records"
    until("the recording on disk", lambda: any(records.glob("*-a1-*-stalled.jsonl.gz")))
    [record] = records.glob("*-a1-*-stalled.jsonl.gz")
    replayed = json.loads(life.ctl("replay", str(record), "--json").stdout)
    assert (replayed["outcome"], replayed["cause"]) == ("stalled", fact(stalled, "cause"))
    assert replayed["phases"][-1]["patience_s"] == 2
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_what_began_with_the_old_config_goes_on_under_it_and_is_named(lives: Lives) -> None:
    life = lives.serving
    before = life.ready()
    edit(life, {"engine.args": ["--enforce-eager"], "model.served_name": "other", "serving.probe_timeout": 7})
    done = life.ctl("reload")
    assert (done.returncode, done.stdout) == (
        0,
        "applied: serving.probe_timeout\n"
        "needs a restart: model.served_name, engine.args; do it with: systemctl restart mgpu-llm\n",
    )
    told = life.told("config.reloaded")[-1]
    assert (fact(told, "applied"), fact(told, "needs_restart")) == (
        "serving.probe_timeout",
        "model.served_name; engine.args",
    )
    assert life.ctl("restart", "--wait").returncode == 0
    after = life.status()
    assert (after["model"], after["attempt"]) == (before["model"], 2)
    assert "--enforce-eager" not in argv_of(after["pid"])
    assert reloaded(life) == {"applied": [], "needs_restart": ["model.served_name", "engine.args"]}


def test_a_wrong_config_changes_nothing_and_names_every_problem(lives: Lives) -> None:
    life = lives.serving
    pid = life.ready()["pid"]
    count = len(life.told("config.reload-failed"))
    edit(life, {"patience.weights": -1, "gpus.tensor_parallel": 3, "daemon.log_level": "debug", "engine.prot": 8000})
    done = life.ctl("reload")
    assert (done.returncode, done.stdout) == (exits.REFUSED, "")
    *problems, last = done.stderr.splitlines()
    assert last == "mgpuctl: cannot reload: the config is wrong; nothing has changed"
    file = life.setup.config_file
    assert [problem.partition(" found ")[0] for problem in problems] == [
        f"{file}: engine.prot:",
        f"{file}: gpus.tensor_parallel:",
        f"{file}: patience.weights:",
    ]
    [told] = life.told("config.reload-failed")[count:]
    assert all(key in fact(told, "why") for key in ("engine.prot", "gpus.tensor_parallel", "patience.weights"))
    file.write_text("nonsense", encoding="utf-8")
    assert life.ctl("reload").returncode == exits.REFUSED
    edit(life, {})
    assert not {"patience.weights", "daemon.log_level"} & {*reloaded(life)["applied"]}
    assert life.status()["pid"] == pid


def test_the_log_level_holds_at_once_and_the_signal_does_what_the_verb_does(lives: Lives) -> None:
    life = lives.serving
    life.ready()
    edit(life, {"daemon.log_level": "debug"})
    life.process.send_signal(signal.SIGHUP)
    until("the reload", lambda: any("by=SIGHUP" in line for line in life.told("config.reloaded")), life.log)
    assert "daemon.log_level" in fact(life.told("config.reloaded")[-1], "applied")
    # The engine's access log of our own probes is for debugging.
    life.wait_log("/health")
    edit(life, {"daemon.log_level": "loud"})
    life.process.send_signal(signal.SIGHUP)
    until("its refusal", lambda: any("by=SIGHUP" in line for line in life.told("config.reload-failed")), life.log)
    assert life.status()["state"] == "ready"


def test_what_the_settings_in_use_have_changed_is_not_forbidden_under_them(lives: Lives) -> None:
    life = lives.degraded
    assert life.ready()["rung"] == "p2p-off"
    edit(life, {"ladder.pin": ["transports"]})
    assert reloaded(life) == {"applied": [], "needs_restart": ["ladder.pin"]}
    edit(life, {"ladder.pin": ["utilisation"]})
    assert reloaded(life) == {"applied": ["ladder.pin"], "needs_restart": []}
    assert life.stop() == 0
