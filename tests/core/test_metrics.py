"""Metrics: what each state tells, what is left out where nobody knows it, and that all of them keep to the conventions."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mgpu_llm.core import metrics, report
from mgpu_llm.core.events import GpusSampled
from mgpu_llm.core.metrics import FAMILIES, PHASES, STATES, Family, Kind, Values
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Backoff, Ready, State, Stopped
from mgpu_llm.core.tally import Tally
from tests.core import everything
from tests.core.world import BANNER, P2P_OFF, World, gpu, loading, policy, serving

IDENTITY = Identity(version="0.1.0", model="m7b", url="http://127.0.0.1:8000")
SHARDS = "Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.00s/it]"


def read(world: World, counted: Tally | None = None) -> dict[str, Values]:
    told = metrics.read(world.state, world.policy, world.at, IDENTITY, counted or Tally())
    return {family.name: values for family, values in told}


def only(values: Values) -> float:
    [value] = values.values()
    return value


def test_every_state_tells_every_metric_with_values_for_just_its_labels() -> None:
    assert {type(state).__name__.lower() for state in everything.STATES} == set(STATES)
    for state in everything.STATES:
        world = World(policy=everything.POLICY, state=state, at=everything.NOW)
        told = list(metrics.read(state, world.policy, world.at, IDENTITY, Tally()))
        assert [family for family, _ in told] == list(FAMILIES)
        for family, values in told:
            assert all(len(labels) == len(family.labels) for labels in values), family
        assert [name for (name,), now in read(world)["state"].items() if now] == [type(state).__name__.lower()]
        assert sum(read(world)["phase"].values()) in (0.0, 1.0)


def test_a_phase_that_is_told_is_one_of_those_that_are_listed() -> None:
    phases = {report.status(s, everything.POLICY, everything.NOW, IDENTITY).phase for s in everything.STATES}
    assert phases <= {"", *PHASES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_and_helps_keep_to_prometheus_conventions(family: Family) -> None:
    assert re.fullmatch(r"mgpu_llm_[a-z][a-z_]*[a-z]", family.full_name)
    assert family.full_name.endswith("_total") == (family.kind is Kind.COUNTER)
    assert not re.search(r"_(ms|milliseconds|percent|minutes|mib|kilobytes)(_|$)", family.name)
    assert family.help.endswith(".")
    assert not {"job", "instance", "le", "quantile"}.intersection(family.labels)


def test_no_metric_is_there_twice() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_a_load_tells_how_far_it_is_and_how_long_nothing_has_moved() -> None:
    world = loading().say(SHARDS).look()
    world.watch(5.0)
    told = read(world, Tally(quiet_s=77.0))
    assert told["phase"][("weights",)] == 1.0
    assert only(told["phase_progress_ratio"]) == 0.25
    assert only(told["load_elapsed_seconds"]) == pytest.approx(world.at - 1000.0)
    assert only(told["quiet_seconds"]) == only(told["longest_quiet_seconds"]) == 5.0
    assert only(told["patience_seconds"]) == 25.0
    assert told["load_left_seconds"] == told["weights_read_bytes_per_second"] == told["retry_in_seconds"] == {}


def test_what_only_a_load_has_is_not_there_of_an_engine_that_serves() -> None:
    told = read(serving(), Tally(quiet_s=7.5, services=2, ready_s=90.0, load_s=30.0, starts=3))
    assert told["phase"][("serving",)] == 1.0
    names = ("phase_progress_ratio", "load_elapsed_seconds", "quiet_seconds", "patience_seconds")
    assert [told[name] for name in names] == [{}] * 4
    assert only(told["longest_quiet_seconds"]) == 7.5
    assert (only(told["ready_total"]), only(told["time_to_ready_seconds"]), only(told["load_seconds"])) == (2, 90, 30)
    assert (only(told["engine_starts_total"]), only(told["engine_deaths_total"])) == (3, 0)


def test_before_anything_has_served_nothing_is_told_of_how_long_it_took() -> None:
    told = read(World())
    assert told["time_to_ready_seconds"] == told["load_seconds"] == told["longest_quiet_seconds"] == {}
    assert not any(told["phase"].values())
    assert told["state"][("stopped",)] == 1.0


def test_attempts_are_told_by_outcome_and_cause() -> None:
    told = read(World(), Tally(ended={("died", "worker-killed"): 2, ("stalled", "nccl-p2p"): 1}))
    assert told["attempts_total"] == {("died", "worker-killed"): 2.0, ("stalled", "nccl-p2p"): 1.0}
    assert only(told["engine_deaths_total"]) == 2.0


def test_a_rung_below_the_base_is_degraded_only_while_it_serves() -> None:
    world = serving()
    assert isinstance(world.state, Ready)
    assert (read(world)["rung_info"], only(read(world)["degraded"])) == ({("base",): 1.0}, 0.0)
    lower = everything.RUN
    served: State = Ready(run=lower, since=1.0, spawned_at=0.0, progress=world.state.progress, pid=1)
    world.state = served
    assert (read(world)["rung_info"], only(read(world)["degraded"])) == ({("p2p-off",): 1.0}, 1.0)
    world.state = Backoff(run=lower, rung=P2P_OFF, until=world.at + 4.0)
    assert (only(read(world)["degraded"]), only(read(world)["retry_in_seconds"])) == (0.0, 4.0)


def test_memory_is_told_by_gpu_and_not_for_one_of_which_it_is_not_known() -> None:
    world = World(policy=policy(uuids={"0": "GPU-a", "1": "GPU-b"})).start().say(BANNER)
    sampled = (gpu("GPU-a", 5), replace(gpu("GPU-b", 7), total_bytes=80))
    world.send(GpusSampled(at=world.at, attempt=world.attempt, gpus=sampled))
    told = read(world)
    assert told["gpu_memory_used_bytes"] == {("0", "GPU-a"): 5.0, ("1", "GPU-b"): 7.0}
    assert told["gpu_memory_total_bytes"] == {("1", "GPU-b"): 80.0}
    assert told["gpu_out"] == {("0",): 0.0, ("1",): 0.0}


def test_a_gpu_that_is_out_is_told_also_where_the_config_does_not_name_it() -> None:
    world = World(policy=policy(uuids={"0": "GPU-a", "1": "GPU-b"}))
    world.state = Stopped(run=replace(world.state.run, out={"1": "it fell off the bus", "5": "dirty"}))
    assert read(world)["gpu_out"] == {("0",): 0.0, ("1",): 1.0, ("5",): 1.0}
