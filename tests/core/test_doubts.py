"""What looks at the stacks cannot prove, and what they find where small signals go on for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import stacks as stacks_of
from mgpu_llm.core import suspicion
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpuSample, Stack, StacksTaken
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from mgpu_llm.core.states import Killing, Starting
from mgpu_llm.core.suspicion import AGAIN_S, Finding
from tests.core.looks import CONFIRMED_S, stack, working
from tests.core.world import World, gpu, loading, worker

PATIENCE_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]


def taken(at: float, *stacks: Stack) -> StacksTaken:
    return StacksTaken(at=at, attempt=1, stacks=stacks)


def test_looks_that_prove_nothing_are_followed_by_others_which_may_clear_it() -> None:
    world = loading()
    world.stacks = lambda look: () if look == 1 else working(look)
    world.watch(PATIENCE_S + 2 * AGAIN_S + 1.0)
    assert isinstance(world.state, Starting)
    (cleared,) = world.announced("engine.cleared")
    assert cleared.facts["why"] == "its stacks are not where they were"


def test_a_first_look_that_sees_no_frames_proves_nothing_at_once() -> None:
    under_way = suspicion.asked(suspicion.raised(0.0, may_look=True), 0.0)
    unseen = suspicion.after_look(under_way, replace(taken(0.1), unobserved="no ptrace"))
    assert (unseen.finding, unseen.blind) == (Finding.BLIND, "no ptrace")
    assert suspicion.after_look(under_way, taken(0.1)).blind == "no thread shows any Python frames"


def test_a_thread_that_runs_in_one_place_outside_of_all_known_waits_may_work_in_native_code() -> None:
    repacking = stack(71, "process_weights_after_loading (layers/quantization.py:12)")
    world = loading()
    world.stacks = lambda _: (repacking,)
    resting = (gpu(utilisation_percent=0), gpu("GPU-b", utilisation_percent=0))
    world.watch(60.0, lambda _: world.look(gpus=resting))
    assert isinstance(world.state, Killing)
    assert any("perhaps at work in native code: 71 (VLLM::Worker_TP)" in seen for seen in world.last_diagnosis.evidence)
    assert seconds_to_the_verdict_of((stack(71, state="S"),), resting) < seconds_to_the_verdict_of(
        (repacking,), resting
    )


def test_a_thread_that_runs_in_one_place_while_every_gpu_is_fully_busy_waits_for_its_gpu() -> None:
    launching = (stack(71, "call (inductor_cache/x.py:792)"),)
    busy, half = (gpu(), gpu("GPU-b")), (gpu(), gpu("GPU-b", utilisation_percent=50))
    assert seconds_to_the_verdict_of(launching, busy) == pytest.approx(PATIENCE_S + CONFIRMED_S, abs=0.5)
    assert seconds_to_the_verdict_of(launching, half) == pytest.approx(2 * PATIENCE_S, abs=0.5)


def seconds_to_the_verdict_of(stacks: tuple[Stack, ...], gpus: tuple[GpuSample, ...]) -> float:
    world = loading()
    world.stacks = lambda _: stacks
    begun = world.look(gpus=gpus).at
    world.watch(100.0, lambda _: world.look(gpus=gpus))
    assert isinstance(world.state, Killing)
    return world.at - begun


def test_a_frozen_cgroup_is_no_wait_for_storage_and_its_stacks_prove_nothing() -> None:
    frozen = stack(71, state="D", waits_in="do_freezer_trap")
    looked = suspicion.asked(
        suspicion.after_look(suspicion.asked(suspicion.raised(0.0, may_look=True), 0.0), taken(0.1, frozen)), 2.0
    )
    assert suspicion.after_look(looked, taken(2.1, frozen)).blind.startswith("71 (VLLM::Worker_TP) is stopped")
    assert stacks_of.storage_waiters([frozen]) == ()


# -- company ---------------------------------------------------------------------------------------------------------


def monitored(world: World, seconds: float) -> World:
    """A script that polls beside the engine, one more process each 5 s, which reads a little."""

    def each(passed_s: float) -> None:
        monitor = worker(9000 + int(passed_s // 5), name=f"probe-{int(passed_s // 5)}", started=int(passed_s // 5))
        world.look(worker(), replace(monitor, read_chars=int(passed_s * 200_000), rss_bytes=1 << 20))

    return world.watch(seconds, each)


def test_an_engine_that_hangs_in_the_company_of_a_monitor_is_found_by_its_stacks() -> None:
    world = monitored(loading(), 150.0)
    assert isinstance(world.state, Killing)
    assert "nothing but small signals moved for" in world.last_diagnosis.summary
    (announced,) = world.announced("engine.suspected")
    assert announced.facts["only"] == "small signals move"


def test_an_engine_that_works_in_such_company_is_cleared_by_its_stacks_again_and_again() -> None:
    world = loading()
    world.stacks = working
    monitored(world, 400.0)
    assert isinstance(world.state, Starting)
    assert len(world.announced("engine.cleared")) >= 3


def test_company_alone_ends_nothing_where_the_stacks_cannot_be_seen() -> None:
    world = monitored(loading(look_at_stacks=False), 400.0)
    assert isinstance(world.state, Starting)
