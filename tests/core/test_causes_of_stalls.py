"""Stalls that explain themselves: what is stopped, or waits for a lock, for memory, for storage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import progress, stall
from mgpu_llm.core.diagnosis import Clue, of_stall
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import HostSampled, LineRead, ProcessesSampled, ProcessSample, Stack, StacksTaken
from mgpu_llm.core.progress import Progress, begin
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, THRASHING_PERCENT, Circumstances, Stalled
from mgpu_llm.core.states import Backoff, Failed, Killing, Starting
from mgpu_llm.core.suspicion import Finding, Suspicion
from tests.core.looks import stack
from tests.core.world import ASSIGNED, COMPILE, ON_CPU, OUT_OF_MEMORY, World, fed, loading, worker

LOCK = "BaseFileLock.acquire (filelock/_api.py:335)"
WAITS_FOR_LOCK = "Still waiting to acquire lock on /var/cache/x/lock (elapsed: 30.0 seconds)"


def in_weights() -> World:
    return loading(ON_CPU).say(ASSIGNED)


def hung(world: World, *processes: ProcessSample) -> World:
    """Until the verdict, while these processes do nothing."""
    world.watch(120.0, lambda _: world.look(*processes))
    assert isinstance(world.state, Killing)
    return world


# -- each cause, as a story ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["T", "t"])
def test_a_stall_of_an_engine_with_a_stopped_process_is_named_after_it(state: str) -> None:
    found = hung(in_weights(), worker(71, state=state), worker(72)).last_diagnosis
    assert (found.cause, found.outcome) == ("process-stopped", "stalled")
    assert found.summary == "stalled in weights: nothing moved for 27 s, stopped by a signal: 71 (VLLM::Worker_TP)"
    assert "stopped (state T): 71 (VLLM::Worker_TP)" in found.evidence
    assert "kill -CONT" in found.advice


def test_a_stall_whose_stacks_wait_for_a_lock_file_is_a_stale_lock() -> None:
    world = loading(ON_CPU).say(COMPILE)
    world.stacks = lambda _: (stack(71, LOCK), stack(71, LOCK, thread=72), stack(73))
    found = hung(world).last_diagnosis
    assert found.cause == "stale-lock"
    assert found.summary.endswith("waiting for a lock file while nothing compiles: 71 (VLLM::Worker_TP)")
    assert "*.lock" in found.advice


def test_a_stall_whose_last_words_wait_for_a_lock_is_a_stale_lock_where_no_stacks_are_seen() -> None:
    world = loading(ON_CPU, look_at_stacks=False).say(WAITS_FOR_LOCK)
    found = hung(world).last_diagnosis
    assert found.cause == "stale-lock"
    assert found.summary.endswith("the engine (it names /var/cache/x/lock)")


def test_a_lock_that_was_waited_for_before_other_words_came_is_no_cause() -> None:
    world = loading(ON_CPU).say(WAITS_FOR_LOCK, "got it")
    assert hung(world).last_diagnosis.cause == "stalled-in-distributed-init"


def test_a_compiler_that_works_under_the_lock_is_no_stall() -> None:
    world = loading(ON_CPU)
    world.stacks = lambda _: (stack(71, LOCK),)
    world.watch(120.0, lambda passed_s: world.look(worker(), worker(77, name="cicc", cpu_s=passed_s)))
    assert isinstance(world.state, Starting)
    assert world.looks == 0


@pytest.mark.parametrize(
    ("percent", "cause"),
    [(THRASHING_PERCENT, "memory-pressure"), (19.9, "stalled-in-weights"), (None, "stalled-in-weights")],
)
def test_a_host_in_which_everybody_waits_for_memory_is_the_cause(percent: float | None, cause: str) -> None:
    world = in_weights()
    world.send(HostSampled(at=world.at, attempt=1, memory_percent=percent, storage_percent=99.0))
    found = hung(world).last_diagnosis
    assert found.cause == cause
    assert (found.summary.endswith("all work waited for memory 20 % of the last ten seconds")) == (percent == 20.0)


def test_the_last_word_about_the_hosts_memory_counts() -> None:
    world = in_weights()
    for percent in (90.0, 0.0):
        world.send(HostSampled(at=world.at, attempt=1, memory_percent=percent))
    assert hung(world).last_diagnosis.cause == "stalled-in-weights"


def test_a_stall_whose_stacks_wait_for_storage_says_that_the_storage_is_silent() -> None:
    world = in_weights()
    world.stacks = lambda _: (stack(71, waits_in="rpc_wait_bit_killable"), stack(72, "dequeue (x.py:1)", state="S"))
    found = hung(world).last_diagnosis
    assert found.cause == "storage-silent"
    assert found.summary.endswith("waiting for storage that delivers not one byte: 71 (VLLM::Worker_TP)")


def test_where_no_stacks_are_seen_a_process_in_state_d_from_the_first_to_the_last_says_so() -> None:
    world = loading(ON_CPU, look_at_stacks=False).say(ASSIGNED).look(worker(71, state="D"))
    assert hung(world, worker(71, state="D"), worker(72)).last_diagnosis.cause == "storage-silent"


def test_a_process_that_only_ends_in_state_d_was_not_held_up_by_storage() -> None:
    world = loading(ON_CPU, look_at_stacks=False).say(ASSIGNED).look(worker(71))
    states = iter("SSSD" + "D" * 500)
    world.watch(120.0, lambda _: world.look(worker(71, state=next(states))))
    assert world.last_diagnosis.cause == "stalled-in-weights"
    assert "waiting in the kernel (state D): 71 (VLLM::Worker_TP)" in world.last_diagnosis.evidence


@pytest.mark.parametrize(("text", "cause"), [(COMPILE, "stalled-in-compile"), (ASSIGNED, "storage-silent")])
def test_storage_explains_a_stall_only_where_files_are_read(text: str, cause: str) -> None:
    world = loading(ON_CPU).say(text)
    world.stacks = lambda _: (stack(71, state="D"),)
    assert hung(world).last_diagnosis.cause == cause


def test_what_the_engine_has_named_explains_more_than_what_it_waits_for() -> None:
    world = in_weights().say(OUT_OF_MEMORY)
    assert hung(world, worker(71, state="T")).last_diagnosis.cause == "cuda-out-of-memory"


def test_no_rung_cures_such_a_stall_so_it_is_tried_once_more_and_then_given_up() -> None:
    world = hung(in_weights(), worker(71, state="T"))
    assert set(world.last_diagnosis.wants) == {Want.PLAIN_RETRY}
    world.gone()
    assert isinstance(world.state, Backoff)
    world.wait_out_backoff()
    assert (world.rung, world.attempt) == ("base", 2)
    world.look(worker(71, state="T"))
    hung(world, worker(71, state="T")).gone()
    assert isinstance(world.state, Failed)
    assert world.exit is not None
    assert world.exit.status == 69
    assert "no rung left that could help" in world.exit.message


# -- which of several, as a verdict ----------------------------------------------------------------------------------


def _verdict(heart: Progress, *stacks: Stack) -> Stalled:
    look = StacksTaken(at=1.0, attempt=1, stacks=stacks)
    found = Suspicion(since=0.0, last=look, finding=Finding.STILL)
    quiet = replace(heart, quiet_s=1000.0, phase=Phase.WEIGHTS, spoke_known_words=True)
    verdict = stall.judge(quiet, DEFAULT_PATIENCE_S, Circumstances(has_gpus=False), found)
    assert isinstance(verdict, Stalled)
    return verdict


def test_a_stopped_process_explains_more_than_a_lock_that_more_than_memory_and_that_more_than_storage() -> None:
    heart = progress.after_host(
        fed(worker(71, state="T"), worker(71, state="T")), HostSampled(at=1.0, attempt=1, memory_percent=50.0)
    )
    everything = _verdict(heart, stack(72, LOCK), stack(73, state="D"))
    assert everything.stopped == ("71 (VLLM::Worker_TP)",)
    assert everything.lock_waits == ("72 (VLLM::Worker_TP)",)
    assert everything.thrashing == "all work waited for memory 50 % of the last ten seconds"
    assert everything.storage_waits == ("73 (VLLM::Worker_TP)",)
    causes = []
    for explained in ("stopped", "lock_waits", "thrashing", "storage_waits"):
        causes.append(of_stall(everything, Clue()).cause)
        everything = replace(everything, **{explained: "" if explained == "thrashing" else ()})  # type: ignore[arg-type]
    assert causes == ["process-stopped", "stale-lock", "memory-pressure", "storage-silent"]
    assert of_stall(everything, Clue()).cause == "stalled-in-weights"


def test_what_nobody_saw_explains_nothing() -> None:
    verdict = _verdict(begin(0.0))
    assert (verdict.stopped, verdict.lock_waits, verdict.storage_waits, verdict.thrashing) == ((), (), (), "")


def test_several_threads_of_a_process_are_named_once() -> None:
    verdict = _verdict(begin(0.0), stack(73, state="D"), stack(73, state="D", thread=74), stack(75, state="D"))
    assert verdict.storage_waits == ("73 (VLLM::Worker_TP)", "75 (VLLM::Worker_TP)")


def test_a_process_that_was_born_in_the_quiet_was_not_in_state_d_all_along() -> None:
    heart = fed(worker(71), worker(71))
    born = ProcessesSampled(at=3.0, attempt=1, processes=(worker(71), worker(80, name="sh", state="D")))
    heart = replace(progress.after_processes(heart, born), resting=heart.resting)
    assert _verdict(heart).storage_waits == ()


def test_words_about_a_lock_do_not_matter_where_stacks_show_who_waits_for_it() -> None:
    heart = progress.after_line(begin(0.0), LineRead(at=0.0, attempt=1, text=WAITS_FOR_LOCK))
    assert _verdict(heart, stack(71, LOCK)).lock_waits == ("71 (VLLM::Worker_TP)",)
    assert _verdict(heart, stack(71)).lock_waits == ("the engine (it names /var/cache/x/lock)",)
