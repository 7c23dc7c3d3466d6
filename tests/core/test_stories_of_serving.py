"""What the supervisor does once the engine serves, and what systemd and the journal are told on the way there."""

from __future__ import annotations

import pytest

from mgpu_llm.core.effects import (
    Announce,
    ExtendTimeout,
    ProbeHealth,
)
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import HealthProbed
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.serving import LAST_WORDS_S
from mgpu_llm.core.starting import EXTEND_EVERY_S
from mgpu_llm.core.states import Backoff, Killing, Ready
from tests.core.world import (
    ASSIGNED,
    NCCL,
    NOT_FREE,
    OUT_OF_MEMORY,
    UP,
    WORLD_SIZE,
    World,
    loading,
    of,
    policy,
    serving,
    worker,
)

# -- while serving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, -9])
def test_any_exit_while_serving_is_a_failure_and_starts_anew_on_the_same_rung(status: int) -> None:
    world = serving().exits(status)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "died-while-serving"
    world.gone().wait_out_backoff()
    assert world.rung == "base"
    assert world.attempt == 2


def test_three_failed_probes_in_a_row_are_a_death_and_two_are_not() -> None:
    world = serving()
    for healthy in (False, False, True, False, False):
        assert of(world.tick(10.0), ProbeHealth) == [ProbeHealth(attempt=1)]
        world.send(HealthProbed(at=world.at, attempt=1, healthy=healthy, detail="no answer in 5 s"))
    assert isinstance(world.state, Ready)
    assert len(world.announced("engine.unhealthy")) == 4
    world.tick(10.0)
    world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="no answer in 5 s"))
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.summary == "3 health probes in a row failed, the last with: no answer in 5 s"


def test_a_serving_engine_is_probed_at_its_interval_and_never_twice_at_once() -> None:
    world = serving()
    assert world.tick(9.9) == ()
    assert world.tick(0.2) == (ProbeHealth(attempt=1),)
    assert world.tick(30.0) == ()


def test_an_error_printed_while_serving_is_named_when_the_engine_dies() -> None:
    world = serving().say("(EngineCore pid=9) ERROR 11-22 10:00:00 [core.py:1] RuntimeError: CUDA error: xid").exits(0)
    assert world.last_diagnosis.summary.endswith("with exit code 0: RuntimeError: CUDA error: xid")


XID = "(EngineCore pid=9) ERROR 11-22 10:00:00 [core.py:1] RuntimeError: CUDA error: xid"


def test_an_error_of_more_than_half_a_minute_ago_explains_no_death() -> None:
    for passed_s, explained in ((LAST_WORDS_S, True), (LAST_WORDS_S + 0.1, False)):
        world = serving().say(XID)
        world.at += passed_s
        world.exits(0)
        assert ("CUDA error: xid" in world.last_diagnosis.summary) is explained
        assert bool(world.last_diagnosis.evidence) is explained


def test_an_old_error_does_not_hide_the_one_that_ends_the_engine() -> None:
    world = serving().say(XID, NOT_FREE)
    world.at += LAST_WORDS_S + 1.0
    world.say("a line of daily life", OUT_OF_MEMORY).exits(0)
    assert world.last_diagnosis.cause == "cuda-out-of-memory"
    assert "xid" not in world.last_diagnosis.summary


def test_an_error_that_was_survived_does_not_hide_a_later_one_of_the_same_words() -> None:
    world = serving().say(XID)
    world.at += LAST_WORDS_S - 5.0
    world.say(XID)
    world.at += 10.0
    world.exits(0)
    assert world.last_diagnosis.summary.endswith("with exit code 0: RuntimeError: CUDA error: xid")


def test_small_talk_does_not_keep_an_old_error_fresh() -> None:
    world = serving().say(XID)
    for _ in range(4):
        world.at += LAST_WORDS_S / 3
        world.say("INFO:     200 OK")
    world.exits(0)
    assert world.last_diagnosis.summary == "the engine ended while serving with exit code 0"


def test_failed_probes_name_only_fresh_errors_too() -> None:
    for passed_s, cause in ((0.0, "cuda-out-of-memory"), (LAST_WORDS_S, "died-while-serving")):
        world = serving(failed_probes=1).say(OUT_OF_MEMORY)
        world.at += passed_s
        world.tick(10.0)
        world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="500"))
        assert world.last_diagnosis.cause == cause


def test_deaths_of_a_named_cause_step_down_to_the_rung_that_cures_it() -> None:
    world = serving()
    for _ in range(2):
        world.say(OUT_OF_MEMORY).exits(0).gone().wait_out_backoff().serve()
        assert world.rung == "base"
    world.say(OUT_OF_MEMORY).exits(0)
    assert world.last_diagnosis.cause == "cuda-out-of-memory"
    assert world.gone().rung == "utilisation-0.85"


@pytest.mark.parametrize(("load_s", "served_s"), [(0.0, 0.0), (0.0, 599.0), (5000.0, 0.0), (5000.0, 599.0)])
def test_three_deaths_soon_after_ready_step_down_the_ladder_however_long_the_loads_are(
    load_s: float, served_s: float
) -> None:
    world = serving()
    for _ in range(2):
        world.at += served_s
        world.exits(0).gone().wait_out_backoff()
        assert world.rung == "base"
        world.at += load_s
        world.serve()
    world.at += served_s
    world.exits(0)
    world.gone()
    assert world.rung == "p2p-off"
    assert world.state.run.deaths == 1


def test_deaths_after_a_long_service_do_not_step_down() -> None:
    world = serving()
    for _ in range(6):
        world.at += world.policy.deaths_window_s
        world.exits(0)
        assert world.state.run.deaths == 1
        world.gone().wait_out_backoff().serve()
    assert world.rung == "base"


def test_one_long_service_clears_the_deaths_before_it() -> None:
    world = serving()
    counts = []
    for served_s in (5.0, 5.0, 600.0, 5.0):
        world.at += served_s
        world.exits(0)
        counts.append(world.state.run.deaths)
        world.gone().wait_out_backoff().serve()
    assert counts == [1, 2, 1, 2]
    assert world.rung == "base"


def test_loads_that_fail_between_them_do_not_break_a_row_of_deaths() -> None:
    world = serving()
    for _ in range(2):
        world.exits(0).gone().wait_out_backoff().exits(1).gone().wait_out_backoff().serve()
    world.exits(0).gone()
    assert world.rung == "p2p-off"


def test_on_the_next_rung_fewer_deaths_show_that_it_does_not_help_either() -> None:
    world = serving()
    for _ in range(2):
        world.exits(0).gone().wait_out_backoff().serve()
    world.exits(0).gone().serve()
    assert world.rung == "p2p-off"
    world.exits(0).gone().wait_out_backoff().serve()
    assert world.rung == "p2p-off"
    world.exits(0).gone()
    assert world.rung == "p2p-off+utilisation-0.85"


def test_an_engine_that_dies_soon_again_and_again_is_given_up_in_the_end() -> None:
    world = serving()
    for _ in range(30):
        world.exits(0).gone()
        if world.exit is not None:
            break
        if isinstance(world.state, Backoff):
            world.wait_out_backoff()
        world.serve()
    assert world.exit is not None
    assert world.exit.status == 69
    assert len(world.spawned) <= world.policy.attempts


def test_the_last_word_after_too_many_deaths_names_each_of_them() -> None:
    world = World(policy=policy(Launch(gpus=("GPU-a",), tensor_parallel=1, utilisation=None))).start()
    world.serve().exits(0).gone().wait_out_backoff().exits(1).gone().wait_out_backoff()
    world.serve().exits(-9).gone().wait_out_backoff()
    world.serve().exits(-11).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "the engine died 3 times while serving" in world.exit.message
    for told in (
        "attempt 1 (base, 0 s): the engine ended while serving with exit code 0",
        "attempt 2 (base, 0 s): the engine ended in boot with exit code 1",
        "attempt 3 (base, 0 s): the engine ended while serving with signal 9 (SIGKILL)",
        "attempt 4 (base, 0 s): the engine ended while serving with signal 11 (SIGSEGV)",
    ):
        assert told in world.exit.message


def test_deaths_on_the_last_rung_end_the_daemon_with_69() -> None:
    world = World(policy=policy(Launch(gpus=("GPU-a",), tensor_parallel=1, utilisation=None), deaths=1))
    world.start().serve().exits(0).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "the engine died 1 times while serving" in world.exit.message


def test_serving_forgives_the_attempts_before_it() -> None:
    world = loading().exits(1).gone().wait_out_backoff().serve()
    assert world.state.run.tries == 0


# -- systemd's patience ------------------------------------------------------------------------------------------------


def test_systemd_is_asked_for_more_time_only_while_something_moves() -> None:
    world = loading()
    grown = 0

    def grows(_: float) -> None:
        nonlocal grown
        grown += 1
        world.look(worker(rss_bytes=(1500 + 50 * grown) << 20))

    before = len(world.all(ExtendTimeout))
    world.watch(30.0, grows)
    asked = len(world.all(ExtendTimeout)) - before
    assert 3 <= asked <= 30.0 / EXTEND_EVERY_S + 1
    world.watch(EXTEND_EVERY_S + 1)
    before = len(world.all(ExtendTimeout))
    world.watch(60.0)
    assert isinstance(world.state, Killing)
    assert len(world.all(ExtendTimeout)) == before


def test_the_time_asked_for_covers_the_patience_and_the_kill() -> None:
    world = loading().say(ASSIGNED).watch(EXTEND_EVERY_S + 1)
    asked = world.all(ExtendTimeout)[-1].seconds
    assert asked >= world.policy.patience[Phase.WEIGHTS] + world.policy.kill_deadline_s


def test_each_new_attempt_asks_for_its_own_time() -> None:
    world = loading().watch(60.0)
    before = len(world.all(ExtendTimeout))
    world.gone()
    assert len(world.all(ExtendTimeout)) == before + 1


def test_each_phase_is_announced_once() -> None:
    world = World().start().say(WORLD_SIZE, NCCL, WORLD_SIZE, ASSIGNED, NCCL, ASSIGNED, UP)
    assert [said.facts["phase"] for said in world.announced("engine.phase")] == ["distributed-init", "weights", "api"]


def test_a_failure_is_announced_with_its_summary_advice_and_evidence() -> None:
    world = loading().watch(60.0)
    (stalled,) = world.announced("engine.stalled")
    assert stalled.facts["summary"] == world.last_diagnosis.summary
    assert stalled.facts["advice"] == world.last_diagnosis.advice
    seen = [said.facts["seen"] for said in world.all(Announce) if said.name == "engine.evidence"]
    assert seen == list(world.last_diagnosis.evidence)
    assert any("vLLM is using nccl" in str(one) for one in seen)
