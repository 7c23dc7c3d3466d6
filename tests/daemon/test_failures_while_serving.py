"""What happens to an engine that serves, and how it is proven that it does. The daemons run side by side."""

from __future__ import annotations

import http.client
import os
import re
import signal
from collections.abc import Mapping

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, argv_of, causes, option, remains
from tests.support.daemons import complete, processes_of

SCENARIOS: Mapping[str, str] = {
    # Their time counts from the end of the load: long enough that READY comes first on a slow machine as well.
    "exit": "exit-serving=5 unless attempt>=2",
    "unhealthy": "unhealthy=5 unless attempt>=2",
    "deaths": "",
    "deaf": "ignore-sigterm",
    "astray": "grandchildren=3",
    "key in args": "",
    "key in env": "",
    "wildcard": "",
    "embed": "task=embed",
    "cpu": "log=cpu",
}
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "deaths": {"serving.deaths": 2},
    "deaf": {"stop.grace": 1},
    "key in args": {
        "engine.args": ["--api-key", "secret-1", "--served-model-name", "name-of-args"],
        "model.served_name": None,
    },
    "key in env": {"engine.env.VLLM_API_KEY": "secret-2", "model.served_name": "name-of-config"},
    "wildcard": {"engine.host": "0.0.0.0", "model.served_name": None},
}


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin) -> Mapping[str, Life]:
    return {name: begin_for_module(scenario, SETTINGS.get(name)) for name, scenario in SCENARIOS.items()}


def serves_on_attempt(life: Life, attempt: int) -> None:
    life.wait_for(lambda status: status["attempt"] == attempt and status["state"] == "ready", LIMIT_S)


def ends_clean(life: Life) -> None:
    assert life.stop() == 0, life.log()[-3000:]
    assert remains(life.setup) == []


def test_deaths_of_workers_bring_the_engine_back_until_too_many_step_down_the_ladder(lives: Mapping[str, Life]) -> None:
    life = lives["deaths"]
    for attempt, rung in ((1, "base"), (2, "base"), (3, "p2p-off")):
        serves_on_attempt(life, attempt)
        assert life.status()["rung"] == rung
        if attempt < 3:
            os.kill(worker(life), signal.SIGKILL)
    status = life.status()
    assert causes(status) == [("base", "died", "worker-died")] * 2
    assert "exit code 0" in status["attempts"][0]["summary"]
    assert status["degraded"]
    ends_clean(life)


def test_an_engine_that_ends_with_0_while_it_serves_has_died_and_comes_back_on_the_same_rung(
    lives: Mapping[str, Life],
) -> None:
    life = lives["exit"]
    serves_on_attempt(life, 2)
    status = life.status()
    assert causes(status) == [("base", "died", "died-while-serving")]
    assert status["attempts"][0]["summary"].startswith("the engine ended while serving with exit code 0")
    assert (status["rung"], status["degraded"]) == ("base", False)
    assert complete(life.setup.url)
    ends_clean(life)


def test_an_engine_whose_health_fails_three_times_is_replaced(lives: Mapping[str, Life]) -> None:
    life = lives["unhealthy"]
    serves_on_attempt(life, 2)
    (death,) = life.status()["attempts"][:1]
    assert (death["outcome"], death["cause"]) == ("died", "died-while-serving")
    assert death["summary"] == "3 health probes in a row failed, the last with: /health answered 503"
    assert [re.findall(r"failed=(\d) of=3", line) for line in life.told("engine.unhealthy")] == [["1"], ["2"]]
    ends_clean(life)


def test_an_engine_that_minds_no_sigterm_is_killed_after_the_grace(lives: Mapping[str, Life]) -> None:
    life = lives["deaf"]
    life.ready()
    ends_clean(life)
    assert life.told("engine.killing") == ['engine.killing why="still there 1 s after SIGTERM"']


def test_processes_that_left_session_group_and_parent_are_gone_after_a_stop(lives: Mapping[str, Life]) -> None:
    life = lives["astray"]
    life.ready()
    assert sum("astray" in process for process in processes_of(life.setup.runtime_dir)) == 3
    assert len(life.setup.memory()) == 1
    ends_clean(life)


@pytest.mark.parametrize(
    ("name", "key", "model"),
    [("key in args", "secret-1", "name-of-args"), ("key in env", "secret-2", "name-of-config")],
)
def test_the_probes_use_the_api_key_and_the_name_that_the_engine_was_given(
    lives: Mapping[str, Life], name: str, key: str, model: str
) -> None:
    life = lives[name]
    status = life.ready()
    assert (status["attempt"], status["model"]) == (1, model if name == "key in env" else str(life.setup.model))
    assert asked(life.setup.port, "") == 401
    assert asked(life.setup.port, key) == 200
    assert f"'{model}'" in life.log() or model in option(argv_of(status["pid"]), "--served-model-name")
    ends_clean(life)
    assert key not in life.log()
    assert '"POST /v1/completions HTTP/1.1" 200' in life.log()


def test_a_server_on_every_address_is_probed_on_this_host(lives: Mapping[str, Life]) -> None:
    life = lives["wildcard"]
    status = life.ready()
    assert option(argv_of(status["pid"]), "--host") == "0.0.0.0"
    assert (status["url"], status["model"]) == (life.setup.url, str(life.setup.model))
    ends_clean(life)


def test_a_model_that_only_embeds_is_ready_after_an_embedding(lives: Mapping[str, Life]) -> None:
    life = lives["embed"]
    assert life.ready()["attempt"] == 1
    ends_clean(life)
    posts = re.findall(r'"POST (\S+) HTTP/1.1" (\d+)', life.log())
    assert posts == [("/v1/completions", "404"), ("/v1/embeddings", "200")]


def test_the_words_of_a_newer_vllm_on_cpu_bring_it_to_service_as_well(lives: Mapping[str, Life]) -> None:
    life = lives["cpu"]
    status = life.ready()
    assert causes(status) == []
    phases = re.findall(r"engine\.phase phase=(\S+)", life.log())
    assert phases[0] == "distributed-init"
    assert phases[-1] == "api"
    ends_clean(life)


def worker(life: Life) -> int:
    found = [process.split() for process in processes_of(life.setup.runtime_dir)]
    return next(int(pid) for pid, name in found if name.startswith("VLLM::Worker"))


def asked(port: int, key: str) -> int:
    """The status with which the server answers somebody who has this key."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()
