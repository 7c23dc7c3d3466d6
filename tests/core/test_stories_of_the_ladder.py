"""What the supervisor does when a load fails: the ladder, and which cause goes where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import report
from mgpu_llm.core.effects import (
    Exit,
    ExtendTimeout,
    KillEngine,
    NotifyReady,
    ProbeHealth,
    SpawnEngine,
)
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineGone,
    EngineSpawnFailed,
    HealthProbed,
    StartRequested,
)
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.states import Backoff, Failed, Killing, Starting
from tests.core.world import (
    ASSIGNED,
    BAD_FLAG,
    BANNER,
    BASE,
    COMPILE,
    NCCL,
    NO_KV_MEMORY,
    NOT_FREE,
    OUT_OF_MEMORY,
    UP,
    WORLD_SIZE,
    World,
    loading,
    of,
    policy,
    rungs,
    serving,
)

# -- the seed's story --------------------------------------------------------------------------------------------------


def test_a_hang_in_the_first_collective_is_killed_and_the_next_rung_turns_p2p_off_and_serves_degraded() -> None:
    world = loading()
    begun = world.at
    world.watch(60.0)
    assert isinstance(world.state, Killing)
    assert world.at - begun <= 20.0
    assert world.last_diagnosis.cause == "nccl-p2p"
    assert "NCCL peer-to-peer" in world.last_diagnosis.advice
    assert world.all(KillEngine) == [KillEngine(attempt=1)]

    world.gone()
    assert world.rung == "p2p-off"
    launch = world.all(SpawnEngine)[-1].launch
    assert launch.env["NCCL_P2P_DISABLE"] == "1"
    assert "--disable-custom-all-reduce" in launch.args
    assert launch.utilisation == BASE.utilisation

    world.say(BANNER, WORLD_SIZE, NCCL, ASSIGNED, UP).serve()
    assert world.all(NotifyReady) == [NotifyReady()]
    (degraded,) = world.announced("engine.degraded")
    assert degraded.facts["rung"] == "p2p-off"
    assert "NCCL_P2P_DISABLE=1" in str(degraded.facts["changes"])
    told = report.headline(world.state, world.policy, world.at)
    assert told.startswith("ready, degraded: rung p2p-off (GPUs talk through host memory")


def test_a_start_that_meets_no_fault_serves_on_the_base_rung_and_is_not_degraded() -> None:
    world = serving()
    assert world.rung == "base"
    assert world.announced("engine.degraded") == []
    assert report.headline(world.state, world.policy, world.at) == "ready: attempt 1 on rung base"


def hang_until_the_end(world: World, *words: str) -> Exit:
    """Each attempt says `words` and hangs, until the daemon gives up."""
    while world.exit is None:
        if isinstance(world.state, Starting):
            world.say(*words).look()
        world.watch(400.0).gone()
        if isinstance(world.state, Backoff):
            world.wait_out_backoff()
    return world.exit


def test_a_hang_in_distributed_init_is_cured_by_transport_and_fewer_gpus_and_never_by_less_memory() -> None:
    world = World().start()
    assert hang_until_the_end(world, WORLD_SIZE, NCCL).status == 69
    assert [ended.rung.name for ended in world.state.run.ended] == ["base", "p2p-off", "p2p-off+tp-1"]
    assert {ended.phase for ended in world.state.run.ended} == {"distributed-init"}


@pytest.mark.parametrize(
    ("words", "phase"),
    [((BANNER,), "boot"), ((NCCL, ASSIGNED), "weights"), ((NCCL, ASSIGNED, COMPILE), "compile"), ((NCCL, UP), "api")],
)
def test_an_unknown_cause_walks_the_whole_ladder_in_order_each_rung_on_top_of_the_last(
    words: tuple[str, ...], phase: str
) -> None:
    world = World().start()
    hang_until_the_end(world, *words)
    assert {ended.phase for ended in world.state.run.ended} == {phase}
    names = [ended.rung.name for ended in world.state.run.ended]
    eager = "+eager" if phase == "compile" else ""
    assert names == [
        *(["base"] if phase == "boot" else []), "base", "p2p-off", *([f"p2p-off{eager}"] if eager else []),
        f"p2p-off{eager}+utilisation-0.85", f"p2p-off{eager}+utilisation-0.80", f"p2p-off{eager}+utilisation-0.80+tp-1",
    ]  # fmt: skip
    last = world.all(SpawnEngine)[-1].launch
    assert last == Launch(
        gpus=("GPU-a",),
        tensor_parallel=1,
        utilisation=0.8,
        env={"NCCL_P2P_DISABLE": "1"},
        args=("--disable-custom-all-reduce", *(["--enforce-eager"] if eager else [])),
    )


def test_a_spent_ladder_exits_69_with_one_message_that_names_every_attempt_its_cause_and_what_to_do() -> None:
    world = World().start()
    last = hang_until_the_end(world, WORLD_SIZE, NCCL, ASSIGNED)
    assert last.status == 69
    message = last.message
    for number, rung in enumerate(rungs(world.policy), start=1):
        assert f"attempt {number} ({rung.name}, " in message
    assert message.count("stalled in weights") == 5
    assert message.count("What to do:") == 1
    assert message.count("look at the disk or network file system") == 1
    assert "\n" not in message
    assert isinstance(world.state, Failed)
    assert report.headline(world.state, world.policy, world.at) == message


def test_too_many_attempts_in_a_row_end_it_even_where_rungs_are_left() -> None:
    world = loading(attempts=2)
    world.watch(60.0).gone().say(WORLD_SIZE, NCCL).look().watch(60.0).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "2 attempts in a row have failed" in world.exit.message


# -- causes ------------------------------------------------------------------------------------------------------------


def test_out_of_memory_goes_to_a_memory_rung_at_once_and_skips_transport() -> None:
    world = loading().say(OUT_OF_MEMORY).exits(1).gone()
    assert world.last_diagnosis.cause == "cuda-out-of-memory"
    assert world.rung == "utilisation-0.85"
    assert isinstance(world.state, Starting)


def test_out_of_memory_on_the_last_memory_rung_has_no_cure_left() -> None:
    world = loading()
    for _ in range(3):
        world.say(OUT_OF_MEMORY).exits(1).gone()
    assert [ended.rung.name for ended in world.state.run.ended] == ["base", "utilisation-0.85", "utilisation-0.80"]
    assert world.exit is not None
    assert world.exit.status == 69
    assert "no rung left that could help" in world.exit.message


def test_a_gpu_that_is_not_free_is_waited_for_twice_on_the_same_rung_and_then_asked_for_less() -> None:
    world = loading(ladder=replace(policy().ladder, floor=0.7))
    delays = []
    for _ in range(2):
        world.say(NOT_FREE).exits(1).gone()
        assert isinstance(world.state, Backoff)
        delays.append(world.state.until - world.at)
        assert report.headline(world.state, world.policy, world.at).startswith(f"waiting {delays[-1]:.0f} s before")
        world.wait_out_backoff()
        assert world.rung == "base"
    assert delays == [2.0, 4.0]
    world.say(NOT_FREE).exits(1).gone()
    assert world.rung == "utilisation-0.75", "what is free, less a margin"
    assert world.last_diagnosis.summary == (
        "GPU memory is not free: 107.83 of 139.8 GiB, less than utilisation 0.9 asks for"
    )


def test_a_backoff_asks_systemd_for_the_time_it_takes_and_lasts_until_it_is_over() -> None:
    world = loading().say(NOT_FREE).exits(1)
    effects = world.send(EngineGone(at=world.at, attempt=1))
    assert isinstance(world.state, Backoff)
    assert of(effects, ExtendTimeout)[0].seconds > 2.0
    assert world.announced("engine.waiting")[0].facts["retry_in_s"] == 2.0
    assert world.tick(1.9) == ()
    assert isinstance(world.state, Backoff)
    world.tick(0.2)
    assert isinstance(world.state, Starting)


def test_a_start_request_during_a_backoff_ends_the_wait() -> None:
    world = loading().say(NOT_FREE).exits(1).gone()
    world.send(StartRequested(at=world.at))
    assert isinstance(world.state, Starting)


def test_what_vllm_refuses_exits_65_after_one_attempt_with_the_reason() -> None:
    world = World().start().say(BAD_FLAG).exits(2).gone()
    assert world.exit is not None
    assert world.exit.status == 65
    assert "vLLM refused its arguments: unrecognized arguments: --tensor-paralel 2" in world.exit.message
    assert "vllm serve --help=all" in world.exit.message
    assert world.spawned == [1]


def test_no_memory_for_the_kv_cache_is_answered_with_more_memory_and_never_with_less() -> None:
    world = loading()
    for rung in ("utilisation-0.95", "utilisation-0.95+eager"):
        world.say(NO_KV_MEMORY).exits(1).gone()
        assert world.rung == rung
    world.say(NO_KV_MEMORY).exits(1).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "not tried: more memory utilisation (0.95 is as high as may be), a shorter context (cl" in world.exit.message
    assert 'ladder.may_change does not name "context-length"' in world.exit.message
    assert "raise gpus.memory_utilisation" in world.exit.message


def test_what_is_hopeless_on_a_rung_of_ours_is_giving_up_and_not_the_admins_mistake() -> None:
    world = loading().watch(60.0).gone()
    assert world.rung == "p2p-off"
    world.say(BAD_FLAG).exits(1).gone()
    assert world.exit is not None
    assert world.exit.status == 69
    assert "attempt 1 (base, " in world.exit.message
    assert "stalled in distributed-init" in world.exit.message
    assert "attempt 2 (p2p-off, 0 s): vLLM refused its" in world.exit.message


def test_an_unexplained_crash_is_retried_once_on_the_same_rung_and_then_on_the_next() -> None:
    world = loading().exits(1).gone()
    assert isinstance(world.state, Backoff)
    world.wait_out_backoff()
    assert world.rung == "base"
    world.exits(-11).gone()
    assert world.rung == "p2p-off"
    assert world.last_diagnosis.summary == "the engine ended in boot with signal 11 (SIGSEGV)"


def test_an_exit_with_status_0_while_loading_is_a_failure_too() -> None:
    world = loading().exits(0)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.summary == "the engine ended in distributed-init with exit code 0"


def test_an_engine_that_cannot_be_spawned_is_tried_again_unless_that_is_hopeless() -> None:
    world = World()
    world.send(StartRequested(at=world.at))
    world.send(EngineSpawnFailed(at=world.at, attempt=1, reason="cannot spawn '/opt/vllm': busy", hopeless=False))
    world.gone()
    assert isinstance(world.state, Backoff)
    world.tick(60.0)
    world.send(EngineSpawnFailed(at=world.at, attempt=2, reason="cannot spawn '/opt/vllm': no file", hopeless=True))
    world.gone()
    assert world.exit is not None
    assert world.exit.status == 65
    assert "attempt 2 (base, 0 s): cannot spawn '/opt/vllm': no file" in world.exit.message
    assert "engine.command" in world.exit.message


def test_a_refused_completion_is_hopeless_and_a_failed_one_is_asked_again() -> None:
    world = loading().say(UP)
    world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200"))
    world.tick(1.5)
    world.send(CompletionProbed(at=world.at, attempt=1, served=False, detail="503"))
    assert isinstance(world.state, Starting)
    assert of(world.tick(1.5), ProbeHealth) == [ProbeHealth(attempt=1)]
    world.send(CompletionProbed(at=world.at, attempt=1, served=False, detail="401 Unauthorized", hopeless=True))
    world.gone()
    assert world.exit is not None
    assert world.exit.status == 65
    assert "the server refuses a one-token request: 401 Unauthorized" in world.exit.message
