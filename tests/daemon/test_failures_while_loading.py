"""What goes wrong in a load, and how the daemon comes to service after all, or says that it cannot.

The daemons of this module run side by side from its beginning; each test looks at one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.lives import Life, argv_of, causes, environ_of, fact, remains
from tests.support.fake_setup import PHASES

SCENARIOS: Mapping[str, str] = {
    "p2p": "hang-init=spin unless NCCL_P2P_DISABLE=1",
    "weights": "hang-weights unless attempt>=2",
    "chatter": "hang-init unless attempt>=2; chatter",
    "boot": "hang-boot unless attempt>=2",
    "mute": "mute-completion unless attempt>=2",
    "spent": "hang-init",
    "signal": "sigkill unless attempt>=2",
    "worker": "worker-dies unless attempt>=2",
    "crash": "exit=3",
    "zero": "exit=0 unless attempt>=2",
    "flag": "bad-flag",
    "model": "missing-model",
    "flood": "flood=50",
}
#: Long enough that a machine with all of these at once upsets no healthy load.
SHORT_S = 3
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "p2p": {"patience.distributed_init": SHORT_S},
    "weights": {"patience.weights": SHORT_S},
    "chatter": {"patience.distributed_init": SHORT_S},
    # An engine that never spoke gets the longest patience of all.
    "boot": {f"patience.{phase}": 6 for phase in PHASES},
    "mute": {"patience.api": SHORT_S, "serving.completion_timeout": 1},
    "spent": {"patience.distributed_init": 1.5},
    "crash": {"ladder.rungs": []},
    "flood": {"daemon.log_level": "warning"},
}


@pytest.fixture(scope="module")
def lives(begin_for_module: Begin) -> Mapping[str, Life]:
    return {name: begin_for_module(scenario, SETTINGS.get(name)) for name, scenario in SCENARIOS.items()}


def ends_clean(life: Life) -> None:
    assert life.stop() == 0, life.log()[-3000:]
    assert remains(life.setup) == []


def test_a_hang_in_distributed_init_is_cured_by_peer_to_peer_off_and_the_daemon_says_degraded(
    lives: Mapping[str, Life],
) -> None:
    life = lives["p2p"]
    status = life.ready()
    assert causes(status) == [("base", "stalled", "stalled-in-distributed-init")]
    assert re.match(r"stalled in distributed-init: nothing moved for \d+ s", status["attempts"][0]["summary"])
    assert "iommu=pt" in status["attempts"][0]["advice"]
    assert (status["attempt"], status["rung"], status["degraded"]) == (2, "p2p-off", True)
    assert status["changes"] == ["NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce"]
    assert "host memory" in status["cost"]
    assert environ_of(status["pid"])["NCCL_P2P_DISABLE"] == "1"
    assert argv_of(status["pid"])[-1] == "--disable-custom-all-reduce"
    shown = life.ctl("status")
    assert shown.returncode == 0
    assert "degraded (rung p2p-off)" in shown.stdout
    ends_clean(life)
    wanted = ["engine.starting", "engine.stalled", "engine.starting", "engine.ready", "engine.degraded"]
    assert [name for name in life.story() if name != "engine.evidence"] == [
        *wanted,
        "engine.stopping",
        "engine.stopped",
    ]


def test_a_hang_while_weights_load_is_named_with_the_shards_reached(lives: Mapping[str, Life]) -> None:
    status = lives["weights"].ready()
    assert causes(status) == [("base", "stalled", "stalled-in-weights")]
    assert any("1/4" in seen for seen in status["attempts"][0]["evidence"])
    assert "disk" in status["attempts"][0]["advice"]
    ends_clean(lives["weights"])


def test_lines_that_say_only_that_somebody_waits_do_not_keep_a_hung_engine_alive(lives: Mapping[str, Life]) -> None:
    status = lives["chatter"].ready()
    assert causes(status) == [("base", "stalled", "stalled-in-distributed-init")]
    assert "No available shared memory broadcast block" in status["attempts"][0]["evidence"][0]
    ends_clean(lives["chatter"])


def test_an_engine_that_never_prints_a_line_is_stalled_in_boot(lives: Mapping[str, Life]) -> None:
    status = lives["boot"].ready()
    assert causes(status) == [("base", "stalled", "stalled-in-boot")]
    assert status["attempts"][0]["evidence"][0] == "the engine never printed a line"
    ends_clean(lives["boot"])


def test_an_engine_that_is_healthy_and_never_answers_a_completion_is_stalled_in_api(lives: Mapping[str, Life]) -> None:
    life = lives["mute"]
    status = life.ready()
    assert causes(status) == [("base", "stalled", "stalled-in-api")]
    assert status["attempts"][0]["advice"] == "the server is up but no completion comes back"
    assert '"GET /v1/models HTTP/1.1" 200' in life.log().partition("engine.stalled")[0]
    ends_clean(life)


def test_a_ladder_that_is_spent_ends_with_69_and_one_message_with_every_attempt(lives: Mapping[str, Life]) -> None:
    life = lives["spent"]
    assert life.ended() == 69
    (gave_up,) = life.told("daemon.gave-up")
    message = fact(gave_up, "message")
    assert message.startswith("gave up: the ladder has no rung left that could help; attempt 1 (base, ")
    assert re.findall(r"attempt (\d) \((\S+), \d+ s\): stalled in distributed-init", message) == [
        ("1", "base"),
        ("2", "p2p-off"),
        ("3", "p2p-off+loopback"),
        ("4", "p2p-off+loopback+tp-1"),
    ]
    assert message.count("iommu=pt") == 1
    assert fact(gave_up, "exit_status") == "69"
    assert remains(life.setup) == []


def test_an_engine_that_is_killed_in_mid_load_is_tried_again_with_the_same_settings(lives: Mapping[str, Life]) -> None:
    status = lives["signal"].ready()
    assert causes(status) == [("base", "crashed", "engine-killed")]
    assert "signal 9 (SIGKILL)" in status["attempts"][0]["summary"]
    assert (status["attempt"], status["rung"], status["degraded"]) == (2, "base", False)
    ends_clean(lives["signal"])


def test_a_worker_that_is_killed_in_mid_load_is_a_crash_and_tried_again(lives: Mapping[str, Life]) -> None:
    status = lives["worker"].ready()
    assert causes(status) == [("base", "crashed", "worker-died")]
    assert "died without saying why" in status["attempts"][0]["summary"]
    assert (status["attempt"], status["rung"]) == (2, "base")
    ends_clean(lives["worker"])


def test_an_engine_that_ends_with_0_while_it_loads_has_failed(lives: Mapping[str, Life]) -> None:
    status = lives["zero"].ready()
    assert causes(status) == [("base", "crashed", "engine-exited")]
    assert "exit code 0" in status["attempts"][0]["summary"]
    ends_clean(lives["zero"])


def test_crashes_without_a_ladder_end_with_69_after_the_tries_of_one_rung(lives: Mapping[str, Life]) -> None:
    life = lives["crash"]
    assert life.ended() == 69
    assert life.story().count("engine.starting") == 2
    assert life.story().count("engine.waiting") == 1
    message = fact(life.told("daemon.gave-up")[0], "message")
    assert re.search(
        r"; attempts 1, 2 \(base, \d+ s\): .* with exit code 3: RuntimeError: something went wrong", message
    )
    assert remains(life.setup) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flag", "vLLM refused its arguments: unrecognized arguments: --no-such"),
        ("model", "the model cannot be found"),
    ],
)
def test_what_vllm_refuses_ends_with_65_at_the_first_attempt(lives: Mapping[str, Life], name: str, words: str) -> None:
    life = lives[name]
    assert life.ended() == 65
    assert life.story().count("engine.starting") == 1
    message = fact(life.told("daemon.gave-up")[0], "message")
    assert message.startswith("gave up: no retry can help; attempt 1 (base, ")
    assert words in message
    assert "What to do: " in message
    assert remains(life.setup) == []


def test_fifty_megabytes_of_output_in_mid_load_disturb_neither_the_load_nor_the_daemon(
    lives: Mapping[str, Life],
) -> None:
    life = lives["flood"]
    status = life.ready()
    assert (status["attempt"], causes(status)) == (1, [])
    process = Path(f"/proc/{life.process.pid}/status").read_text()
    peak_kib = re.search(r"VmHWM:\s+(\d+) kB", process)
    assert peak_kib is not None
    assert int(peak_kib[1]) < 200_000
    assert life.ctl("logs", "-n", "5").stdout.count("\n") == 5
    ends_clean(life)
