"""New processes are progress while a load brings its workers up, and not when a script polls for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.progress import MOST_BIRTHS
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from mgpu_llm.core.states import Killing, Starting
from tests.core.looks import working
from tests.core.world import NCCL, WORLD_SIZE, loading, worker

PATIENCE_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]


def test_a_script_that_polls_is_no_progress_for_ever_however_large_its_children_are() -> None:
    """One process a second is born and ends, each with 50 MiB: after the first few it says nothing any more."""
    world = loading().say(WORLD_SIZE, NCCL)

    def poll(seconds: float) -> None:
        pid = 5000 + int(seconds)
        world.look(worker(), replace(worker(), pid=pid, started=pid, name="nvidia-smi", rss_bytes=50 << 20))

    begun = world.at
    world.watch(120.0, poll)
    assert isinstance(world.state, Killing)
    assert world.last_diagnosis.cause == "nccl-p2p"
    assert world.at - begun == pytest.approx(MOST_BIRTHS + PATIENCE_S, abs=2.5)


def test_workers_that_come_up_one_by_one_are_progress() -> None:
    world = loading().say(WORLD_SIZE, NCCL)
    world.stacks = working
    workers = [replace(worker(), pid=6000 + rank, started=rank, name="VLLM::Worker") for rank in range(MOST_BIRTHS)]
    for count in range(1, MOST_BIRTHS + 1):
        for _ in range(20):
            world.tick()
            world.look(*workers[:count])
    assert isinstance(world.state, Starting), "one every 10 s, which import in the meantime"
