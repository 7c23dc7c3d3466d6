"""How long quiet may last: judged through the supervisor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import progress, stall
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpusUnobserved, LineRead
from mgpu_llm.core.progress import LONGEST_LOOK_S, begin
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, FAILED_PATIENCE_S, Circumstances, Moving, judge
from mgpu_llm.core.states import Killing, Starting
from tests.core.looks import CONFIRMED_S
from tests.core.world import (
    ASSIGNED,
    BANNER,
    COMPILE,
    NCCL,
    NO_KV_MEMORY,
    NOT_FREE,
    ON_CPU,
    OUT_OF_MEMORY,
    UP,
    World,
    compiling,
    fed,
    loading,
    policy,
    seconds_to_the_verdict,
    worker,
)

GPUS = Circumstances(has_gpus=True)
PATIENCE_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]
LONGEST_S = max(DEFAULT_PATIENCE_S.values())


# -- patience ----------------------------------------------------------------------------------------------------------


NO_KERNEL = (
    "(Worker pid=9) ERROR 11-22 10:00:00 [x.py:1] RuntimeError: CUDA error: no kernel image is available for execution"
)


def test_an_engine_that_prints_nothing_known_gets_the_longest_patience() -> None:
    silent = World().start().look()
    assert seconds_to_the_verdict(silent) == pytest.approx(LONGEST_S + CONFIRMED_S, abs=1.0)
    foreign = World().start().look().say("another engine", "is booting")
    assert seconds_to_the_verdict(foreign) == pytest.approx(LONGEST_S + CONFIRMED_S, abs=1.0)
    assert foreign.last_diagnosis.cause == "stalled-in-boot"


@pytest.mark.parametrize(
    "text", [BANNER, "INFO 11-22 10:20:11 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='/m'"]
)
def test_an_engine_that_has_said_what_it_is_gets_the_patience_of_the_boot(text: str) -> None:
    world = World(policy=policy(patience=dict(DEFAULT_PATIENCE_S) | {Phase.BOOT: 40.0})).start().look()
    assert seconds_to_the_verdict(world.say(text)) == pytest.approx(40.0 + CONFIRMED_S, abs=1.0)
    assert world.last_diagnosis.cause == "stalled-in-boot"


def test_each_phase_has_its_own_patience() -> None:
    patience = {phase: 10.0 * (phase + 1) for phase in Phase}
    for phase, text in (
        (Phase.BOOT, BANNER),
        (Phase.DISTRIBUTED_INIT, NCCL),
        (Phase.WEIGHTS, ASSIGNED),
        (Phase.COMPILE, COMPILE),
        (Phase.KV_CACHE, "INFO 11-22 10:21:31 [gpu_worker.py:560] Available KV cache memory: 117.78 GiB"),
        (Phase.WARM_UP, "INFO 11-22 10:21:31 [kv_cache_utils.py:2177] GPU KV cache size: 4,410,656 tokens"),
        (Phase.API, UP),
    ):
        world = World(policy=policy(patience=patience)).start().look().say(text)
        assert seconds_to_the_verdict(world) == pytest.approx(patience[phase] + CONFIRMED_S, abs=1.0)
        known = {Phase.DISTRIBUTED_INIT: "nccl-p2p"}
        assert world.last_diagnosis.cause == known.get(phase, f"stalled-in-{phase.label}")


def test_unobserved_gpus_triple_the_patience_and_are_announced_once() -> None:
    world = loading()
    begun = world.at

    def blind(_: float) -> None:
        world.look(gpus=())
        world.send(GpusUnobserved(at=world.at, attempt=1, reason="NVML did not answer in 2 s"))

    world.watch(300.0, blind)
    assert isinstance(world.state, Killing)
    assert world.at - begun == pytest.approx(3 * PATIENCE_S + CONFIRMED_S, abs=1.0)
    (announced,) = world.announced("gpus.unobserved")
    assert announced.facts["why"] == "NVML did not answer in 2 s"
    assert "GPUs not observed: NVML did not answer in 2 s" in world.last_diagnosis.evidence


def test_gpus_that_come_and_go_are_announced_once_an_attempt() -> None:
    world = loading()
    for _ in range(3):
        world.send(GpusUnobserved(at=world.at, attempt=world.attempt, reason="NVML did not answer in 2 s"))
        world.look()
        assert isinstance(world.state, Starting)
        assert world.state.progress.gpus_unobserved == ""
    assert len(world.announced("gpus.unobserved")) == 1
    world.watch(60.0).gone()
    for _ in range(2):
        world.send(GpusUnobserved(at=world.at, attempt=world.attempt, reason="NVML did not answer in 2 s"))
    assert len(world.announced("gpus.unobserved")) == 2


def test_gpus_that_are_seen_again_bring_the_patience_back() -> None:
    world = loading()
    world.send(GpusUnobserved(at=world.at, attempt=1, reason="NVML did not answer in 2 s"))
    assert seconds_to_the_verdict(world.look()) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=1.0)


def test_a_launch_without_gpus_misses_none() -> None:
    world = loading(ON_CPU)
    world.send(GpusUnobserved(at=world.at, attempt=1, reason="no NVIDIA driver"))
    assert seconds_to_the_verdict(world) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=1.0)


def test_a_host_that_was_suspended_for_ten_minutes_has_no_stall() -> None:
    world = loading()
    world.watch(4.0)
    assert isinstance(world.state, Starting)
    quiet_s = world.state.progress.quiet_s
    world.at += 600.0
    world.look()
    world.tick()
    assert isinstance(world.state, Starting)
    # The ten minutes count for LONGEST_LOOK_S, and what is left of the patience passes as it would have.
    assert world.state.progress.quiet_s == quiet_s + LONGEST_LOOK_S
    assert world.state.suspicion is None
    left_s = PATIENCE_S - quiet_s - LONGEST_LOOK_S + CONFIRMED_S
    assert seconds_to_the_verdict(world) == pytest.approx(left_s, abs=1.0)


def test_time_in_which_nobody_looked_is_not_held_against_the_engine() -> None:
    world = loading()
    for _ in range(1000):
        world.tick()
    assert isinstance(world.state, Starting)


def test_the_first_look_and_a_clock_that_stands_still_measure_no_quiet() -> None:
    heart = fed(worker(), worker(), every_s=0.0)
    assert heart.quiet_s == 0.0
    assert heart.busy == {}


# -- once the engine has named the cause of its failure -----------------------------------------------------------------


@pytest.mark.parametrize("text", [NOT_FREE, OUT_OF_MEMORY, NO_KV_MEMORY])
def test_an_engine_that_named_its_failure_and_does_not_end_is_judged_soon(text: str) -> None:
    world = compiling(patience=dict.fromkeys(Phase, 3 * FAILED_PATIENCE_S))
    assert seconds_to_the_verdict(world.say(text)) == pytest.approx(FAILED_PATIENCE_S + CONFIRMED_S, abs=1.0)


def test_an_error_that_names_no_cause_does_not_shorten_the_patience() -> None:
    world = compiling().say("(Worker pid=1) ERROR 11-22 10:28:14 [x.py:1] RuntimeError: the peer went away")
    assert seconds_to_the_verdict(world) == pytest.approx(DEFAULT_PATIENCE_S[Phase.COMPILE] + CONFIRMED_S, abs=1.0)


def test_a_named_failure_never_lengthens_the_patience_and_shortens_that_of_unobserved_gpus_too() -> None:
    assert seconds_to_the_verdict(loading().say(OUT_OF_MEMORY)) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=1.0)
    failed = Circumstances(has_gpus=True, failed=True)
    for phase in (Phase.DISTRIBUTED_INIT, Phase.COMPILE):
        blind = replace(begin(0.0), spoke_known_words=True, phase=phase, gpus_unobserved="no NVML")
        unnamed_s = stall.patience_now(blind, DEFAULT_PATIENCE_S, GPUS)
        assert unnamed_s == 3 * DEFAULT_PATIENCE_S[phase]
        assert stall.patience_now(blind, DEFAULT_PATIENCE_S, failed) == min(unnamed_s, FAILED_PATIENCE_S)
    assert 3 * PATIENCE_S < FAILED_PATIENCE_S < 3 * DEFAULT_PATIENCE_S[Phase.COMPILE]


def test_an_engine_that_still_moves_after_its_failure_may_end_by_itself() -> None:
    world = compiling().say(NOT_FREE)
    moved = 0

    def moves(_: float) -> None:
        nonlocal moved
        moved += 1
        world.look(worker(rss_bytes=(1500 + 50 * moved) << 20))

    world.watch(3 * FAILED_PATIENCE_S, moves)
    assert isinstance(world.state, Starting)


def test_a_silence_after_a_named_cause_is_diagnosed_by_the_cause() -> None:
    world = compiling().say(OUT_OF_MEMORY).watch(60.0)
    assert world.last_diagnosis.cause == "cuda-out-of-memory"
    assert world.gone().rung == "utilisation-0.85"


def test_a_silence_after_a_hopeless_cause_is_a_stall_and_goes_down_the_ladder() -> None:
    world = compiling().say(NO_KERNEL).watch(60.0)
    assert world.last_diagnosis.cause == "stalled-in-compile"
    assert any("no kernel image" in seen for seen in world.last_diagnosis.evidence)
    assert world.gone().rung == "p2p-off"
    assert world.exit is None


def test_a_load_that_moves_is_told_how_much_of_its_patience_is_used() -> None:
    heart = replace(begin(0.0), quiet_s=4.0, spoke_known_words=True, phase=Phase.WEIGHTS)
    assert judge(heart, DEFAULT_PATIENCE_S, GPUS) == Moving(idle_s=4.0, patience_s=DEFAULT_PATIENCE_S[Phase.WEIGHTS])


def test_the_patience_of_a_verdict_is_the_one_that_held() -> None:
    heart = begin(0.0)
    assert stall.patience_now(heart, DEFAULT_PATIENCE_S, GPUS) == LONGEST_S
    known = progress.after_line(heart, LineRead(at=0.0, attempt=1, text=NCCL))
    assert stall.patience_now(known, DEFAULT_PATIENCE_S, GPUS) == PATIENCE_S
    boot = progress.after_line(heart, LineRead(at=0.0, attempt=1, text=BANNER))
    assert stall.patience_now(boot, DEFAULT_PATIENCE_S, GPUS) == DEFAULT_PATIENCE_S[Phase.BOOT]
