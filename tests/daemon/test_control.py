"""mgpuctl against a daemon that lives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from mgpu_llm import control_api
from mgpu_llm.adapters.memory import known_good
from mgpu_llm.ctl import exits
from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, argv_of, causes, environ_of, fact, remains, until
from tests.support.daemons import complete, processes_of
from tests.support.fake_engine import COMMAND

LADDER = """
[[ladder.rungs]]
name = "other-transport"
env = { NCCL_P2P_LEVEL = "SYS" }
[[ladder.rungs]]
name = "eager"
args = ["--enforce-eager"]
[[ladder.rungs]]
name = "one"
gpus = 1
"""


PLAN = ("plan", "--config")


class Lives(NamedTuple):
    """They run side by side from the beginning of the module. `broken`: once it exists, `breakable`'s engine is refused."""

    plain: Life
    hung: Life
    laddered: Life
    degraded: Life
    breakable: Life
    broken: Path
    first: Life
    ended: Life


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    broken = tmp_path_factory.mktemp("breakable") / "broken"
    script = f'test ! -e "{broken}" || {{ echo "vllm: error: unrecognized arguments: --new"; exit 2; }}; exec "$0" "$@"'
    return Lives(
        plain=begin_for_module(),
        hung=begin_for_module("hang-init unless attempt>=3", {"patience.distributed_init": 600}),
        laddered=begin_for_module("hang-init unless --enforce-eager", {"patience.distributed_init": 2}, tables=LADDER),
        degraded=begin_for_module("hang-init unless NCCL_P2P_DISABLE=1", {"patience.distributed_init": 2}),
        breakable=begin_for_module(settings={"engine.command": ["/bin/sh", "-c", script, *COMMAND, "serve"]}),
        broken=broken,
        first=begin_for_module(),
        ended=begin_for_module("hang-boot"),
    )


def test_stop_status_start_and_restart_go_through_a_life_of_several_engines(lives: Lives) -> None:
    life = lives.plain
    first = life.ready()
    again = life.ctl("start")
    assert (again.returncode, again.stdout) == (0, "nothing to do: the engine is ready already\n")

    stopped = life.ctl("stop", "--wait")
    assert (stopped.returncode, stopped.stdout) == (0, "stop is under way\n"), stopped.stderr
    assert remains(life.setup) == [str(life.setup.socket)]
    shown = life.ctl("status")
    assert shown.returncode == 6
    assert "stopped: no engine runs; mgpuctl start starts it" in shown.stdout
    assert life.ctl("stop").stdout == "nothing to do: no engine runs\n"
    assert life.process.poll() is None

    started = life.ctl("start", "--wait")
    assert started.returncode == 0, started.stderr
    assert re.search(r"^\[\d+\.\d s\] ", started.stderr)
    second = life.status()
    assert (second["state"], second["attempt"], second["rung"]) == ("ready", 2, "base")
    assert second["pid"] != first["pid"]

    restarted = life.ctl("restart", "--wait")
    assert restarted.returncode == 0, restarted.stderr
    third = life.status()
    assert (third["state"], third["attempt"], third["rung"]) == ("ready", 3, "base")
    assert complete(life.setup.url)
    assert life.ctl("status").returncode == 0
    assert [attempt["outcome"] for attempt in third["attempts"]] == ["stopped", "stopped", "ready"]
    asked = [re.search(r"verb=(\w+) by=\"uid \d+", line) for line in life.told("control.request")]
    assert [found[1] for found in asked if found] == ["start", "stop", "stop", "start", "restart"]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_load_can_be_stopped_restarted_and_called_back_while_it_ends(lives: Lives) -> None:
    life = lives.hung
    life.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)
    assert life.ctl("status").returncode == 1
    restarted = life.ctl("restart")
    assert restarted.returncode == 0
    life.wait_for(lambda status: status["attempt"] == 2 and status["phase"] == "distributed-init", LIMIT_S)
    assert life.ctl("stop").returncode == 0
    started = life.ctl("start", "--wait")
    assert started.returncode == 0, started.stderr
    status = life.status()
    assert (status["state"], status["attempt"]) == ("ready", 3)
    assert causes(status) == [("base", "stopped", ""), ("base", "stopped", "")]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_ladder_attempts_and_logs_tell_what_the_daemon_did(lives: Lives) -> None:
    life = lives.laddered
    status = life.ready()
    assert (status["rung"], status["degraded"]) == ("other-transport+eager", True)
    assert (environ_of(status["pid"])["NCCL_P2P_LEVEL"], argv_of(status["pid"])[-1]) == ("SYS", "--enforce-eager")
    rungs = json.loads(life.ctl("ladder", "--json").stdout)["rungs"]
    assert [(rung["name"], rung["changes"], rung["standing"]) for rung in rungs] == [
        ("base", [], "tried"),
        ("other-transport", ["NCCL_P2P_LEVEL=SYS"], "tried"),
        ("other-transport+eager", ["NCCL_P2P_LEVEL=SYS", "--enforce-eager"], "current"),
        (
            "other-transport+eager+one",
            ["NCCL_P2P_LEVEL=SYS", "--enforce-eager", "--tensor-parallel-size 2 -> 1"],
            "next",
        ),
    ]
    told = life.ctl("ladder").stdout
    assert all(rung["name"] in told for rung in rungs)
    attempts = json.loads(life.ctl("attempts", "--json").stdout)["attempts"]
    assert [(attempt["rung"], attempt["outcome"]) for attempt in attempts] == [
        ("base", "stalled"),
        ("other-transport", "stalled"),
        ("other-transport+eager", "ready"),
    ]
    assert "stalled in distributed-init" in life.ctl("attempts").stdout
    logs = life.ctl("logs", "-n", "1000").stdout
    assert "vLLM is using nccl==2.28.9" in logs
    assert logs.count("Application startup complete.") == 1
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_what_a_degraded_service_gave_up_is_told_and_forgotten_on_request(lives: Lives) -> None:
    life = lives.degraded
    assert life.ready()["rung"] == "p2p-off"
    told = life.status()["degradation"]
    [(_, _, cause)] = causes(life.status())
    assert (told["cause"], told["changes"]) == (cause, ["NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce"])
    page = life.ctl("status").stdout
    assert f"Degraded: since {told['since']}, because of {cause}\n" in page
    assert "Way back: remove the cause, then: mgpuctl forget && mgpuctl restart\n" in page

    file = life.setup.state_dir / control_api.KNOWN_GOOD_NAME
    assert file.name == known_good.NAME
    until("the rung on disk", file.exists)
    forgotten = life.ctl("forget")
    assert (forgotten.returncode, forgotten.stdout) == (
        0,
        f"forgotten: rung p2p-off, which has served since {told['since']}; "
        "the next start begins with your settings: mgpuctl restart\n",
    )
    until("the rung gone from the disk", lambda: not file.exists())
    assert life.ctl("forget").stdout == "nothing to do: no rung is remembered\n"
    assert life.status()["state"] == "ready"
    assert life.ctl("restart", "--wait").returncode == 0
    rungs = [attempt["rung"] for attempt in life.status()["attempts"]]
    assert rungs == ["base", "p2p-off", "base", "p2p-off"]
    assert life.stop() == 0


def test_the_plan_of_a_daemon_is_that_of_its_config(lives: Lives) -> None:
    life = lives.first
    life.ready()
    file = str(life.setup.config_file)
    for cause in ("unknown", "stalled-in-distributed-init", "model-refused"):
        asked, made = life.ctl("plan", "--cause", cause, "--json"), life.ctl(*PLAN, file, "--cause", cause, "--json")
        assert (asked.returncode, made.returncode) == (0, 0), asked.stderr + made.stderr
        # Only a daemon knows where its next start begins: here nothing has served on a rung of ours.
        assert json.loads(asked.stdout) == {**json.loads(made.stdout), "begins": None}
        assert json.loads(asked.stdout)["cause"] == cause
    page = life.ctl("plan").stdout
    assert " 1  base\n     the settings as configured\n" in page
    assert " 2  p2p-off\n     NCCL_P2P_DISABLE=1; --disable-custom-all-reduce\n     costs: GPUs talk" in page
    assert f"serve {life.setup.model} --tensor-parallel-size 2" in page
    for words in (("plan",), (*PLAN, file)):
        unknown = life.ctl(*words, "--cause", "stalled-in-boots")
        assert unknown.returncode == 2
        assert "did you mean 'stalled-in-boot'" in unknown.stderr


def test_the_plan_of_a_config_that_is_wrong_is_its_problems(lives: Lives, tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("engine.port = 0\n")
    made = lives.first.ctl(*PLAN, str(file))
    assert (made.returncode, made.stdout) == (exits.REFUSED, "")
    assert f"{file}: " in made.stderr
    assert made.stderr.endswith("mgpuctl: cannot plan: mgpud --plan ended with exit status 78\n")


def test_waiting_for_a_start_that_is_hopeless_ends_with_the_daemon(lives: Lives) -> None:
    life = lives.breakable
    life.ready()
    assert life.ctl("stop", "--wait").returncode == 0
    lives.broken.touch()
    waited = life.ctl("start", "--wait")
    assert waited.returncode in (exits.NO_DAEMON, exits.FAILED)
    assert life.ended() == 65
    # What was stopped on request before is no part of the failure.
    message = fact(life.told("daemon.gave-up")[0], "message")
    assert message.startswith("gave up: no retry can help; attempt 2 (base, ")
    assert remains(life.setup) == []


def test_without_a_daemon_every_verb_ends_with_3_and_one_line_that_says_how_to_start_it(lives: Lives) -> None:
    life = lives.ended
    life.wait_for(lambda status: status["pid"] is not None, LIMIT_S)
    assert life.stop() == 0
    for verb in ("status", "attempts", "ladder", "logs", "start", "stop", "restart"):
        asked = life.ctl(verb)
        assert (asked.returncode, asked.stdout) == (3, "")
        line = f"mgpuctl: no daemon answers on {life.socket}; start it with: systemctl start mgpu-llm\n"
        assert asked.stderr == line
    asked = life.ctl("forget")
    assert (asked.returncode, asked.stdout) == (3, "")
    assert "; without it, remove known-good.json below daemon.state_dir" in asked.stderr


def test_a_second_daemon_is_refused_and_the_first_goes_on(begin: Begin, lives: Lives) -> None:
    first = lives.first
    pid = first.ready()["pid"]
    engine = processes_of(first.setup.runtime_dir)
    second = begin(settings={"daemon.runtime_dir": str(first.setup.runtime_dir)})
    assert second.ended() == 75
    assert second.log() == (
        f"cannot start: another mgpud (pid {first.process.pid}) runs with '{first.setup.runtime_dir}'; "
        "stop it, or set daemon.runtime_dir\n"
    )
    assert processes_of(first.setup.runtime_dir) == engine
    assert first.status()["pid"] == pid
    assert complete(first.setup.url)
    assert Path(first.socket).is_socket()
    assert first.stop() == 0
