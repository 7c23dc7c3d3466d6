from __future__ import annotations

import pytest

from mgpu_llm.core.ladder import CustomRung, Heads, Kind, Rung, built_in, fewer, from_config, next_rung, splits
from mgpu_llm.core.launch import Launch

UNKNOWN = Heads()
SEVENTY = Heads(attention=64, key_value=8)
SEVEN = Heads(attention=28, key_value=4)


def launch(tensor_parallel: int, utilisation: float | None = 0.9) -> Launch:
    gpus = tuple(f"GPU-{index}" for index in range(tensor_parallel))
    return Launch(gpus=gpus, tensor_parallel=tensor_parallel, utilisation=utilisation)


def names(rungs: tuple[Rung, ...]) -> list[str]:
    return [rung.name for rung in rungs]


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "expected"),
    [
        (1, SEVENTY, ["base", "utilisation-0.85", "utilisation-0.80"]),
        (1, UNKNOWN, ["base", "utilisation-0.85", "utilisation-0.80"]),
        (2, SEVENTY, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-1"]),
        (2, SEVEN, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-1"]),
        (2, UNKNOWN, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-1"]),
        (4, SEVENTY, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-2", "tp-1"]),
        (4, SEVEN, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-2", "tp-1"]),
        (4, UNKNOWN, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-2", "tp-1"]),
        (8, SEVENTY, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-4", "tp-2", "tp-1"]),
        (8, UNKNOWN, ["base", "p2p-off", "utilisation-0.85", "utilisation-0.80", "tp-4", "tp-2", "tp-1"]),
    ],
)
def test_the_built_in_ladder_goes_p2p_off_then_less_memory_then_fewer_gpus(
    tensor_parallel: int, heads: Heads, expected: list[str]
) -> None:
    assert names(built_in(launch(tensor_parallel), heads, step=0.05, floor=0.8)) == expected


def test_each_rung_keeps_what_the_rungs_above_it_changed() -> None:
    rungs = built_in(launch(4), SEVENTY, step=0.05, floor=0.85)
    assert [rung.launch.utilisation for rung in rungs] == [0.9, 0.9, 0.85, 0.85, 0.85]
    assert [len(rung.launch.gpus or ()) for rung in rungs] == [4, 4, 4, 2, 1]
    assert all(rung.launch.env == {"NCCL_P2P_DISABLE": "1"} for rung in rungs[1:])
    assert all(rung.launch.args == ("--disable-custom-all-reduce",) for rung in rungs[1:])
    assert [rung.kind for rung in rungs] == [Kind.BASE, Kind.TRANSPORT, Kind.MEMORY, Kind.GPUS, Kind.GPUS]
    assert all(rung.cost for rung in rungs[1:])


@pytest.mark.parametrize(
    ("utilisation", "step", "floor", "values"),
    [
        (0.9, 0.05, 0.8, [0.85, 0.8]),
        (0.9, 0.05, 0.81, [0.85]),
        (0.92, 0.05, 0.8, [0.87, 0.82]),
        (0.8, 0.05, 0.8, []),
        (0.7, 0.05, 0.8, []),
        (None, 0.05, 0.8, []),
        (0.3, 0.1, 0.1, [0.2, 0.1]),
    ],
)
def test_utilisation_is_lowered_in_steps_and_never_below_its_floor(
    utilisation: float | None, step: float, floor: float, values: list[float]
) -> None:
    rungs = built_in(launch(1, utilisation), UNKNOWN, step=step, floor=floor)
    assert [rung.launch.utilisation for rung in rungs[1:]] == values


def test_an_admin_who_switched_p2p_off_already_gets_no_rung_for_it() -> None:
    off = Launch(
        gpus=("0", "1"),
        tensor_parallel=2,
        utilisation=0.8,
        env={"NCCL_P2P_DISABLE": "1"},
        args=("--disable-custom-all-reduce",),
    )
    assert names(built_in(off, SEVENTY, step=0.05, floor=0.8)) == ["base", "tp-1"]


def test_half_of_p2p_off_is_completed_by_its_rung() -> None:
    half = Launch(gpus=("0", "1"), tensor_parallel=2, utilisation=0.8, env={"NCCL_P2P_DISABLE": "1"})
    assert names(built_in(half, SEVENTY, step=0.05, floor=0.8)) == ["base", "p2p-off", "tp-1"]


def test_pipeline_parallelism_keeps_p2p_off_and_leaves_out_fewer_gpus() -> None:
    assert names(built_in(launch(1), SEVENTY, step=0.05, floor=0.9, pipeline_parallel=2)) == ["base", "p2p-off"]


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "sizes"),
    [
        (8, SEVENTY, (4, 2, 1)),
        (8, UNKNOWN, (4, 2, 1)),
        (6, UNKNOWN, (3, 2, 1)),
        (4, SEVEN, (2, 1)),
        (7, Heads(attention=28), (4, 2, 1)),
        (16, SEVENTY, (8, 4, 2, 1)),
        (1, SEVENTY, ()),
    ],
)
def test_fewer_gpus_are_the_sizes_that_divide_the_heads(
    tensor_parallel: int, heads: Heads, sizes: tuple[int, ...]
) -> None:
    assert fewer(tensor_parallel, heads) == sizes


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "accepted"),
    [
        (3, SEVENTY, False),
        (16, SEVENTY, True),
        (4, SEVEN, True),
        (7, SEVEN, False),
        (7, Heads(attention=28), True),
        (3, Heads(key_value=4), False),
        (5, UNKNOWN, True),
    ],
)
def test_heads_are_split_evenly_and_key_value_heads_may_be_repeated(
    tensor_parallel: int, heads: Heads, accepted: bool
) -> None:
    assert splits(tensor_parallel, heads) is accepted


def test_the_admins_own_rungs_are_cumulative_in_the_order_written() -> None:
    rungs = from_config(
        launch(4),
        [
            CustomRung(name="eager", args=("--enforce-eager",)),
            CustomRung(name="quiet", env={"NCCL_P2P_DISABLE": "1"}, utilisation=0.7),
            CustomRung(name="half", gpus=2),
        ],
    )
    assert names(rungs) == ["base", "eager", "quiet", "half"]
    assert rungs[3].launch == Launch(
        gpus=("GPU-0", "GPU-1"),
        tensor_parallel=2,
        utilisation=0.7,
        env={"NCCL_P2P_DISABLE": "1"},
        args=("--enforce-eager",),
    )
    assert {rung.kind for rung in rungs[1:]} == {Kind.CUSTOM}


def test_the_next_rung_is_the_first_below_that_cures() -> None:
    rungs = built_in(launch(2), SEVENTY, step=0.05, floor=0.85)
    assert next_rung(rungs, 0, frozenset({Kind.TRANSPORT, Kind.MEMORY, Kind.GPUS})) == 1
    assert next_rung(rungs, 0, frozenset({Kind.MEMORY})) == 2
    assert next_rung(rungs, 0, frozenset({Kind.GPUS})) == 3
    assert next_rung(rungs, 2, frozenset({Kind.MEMORY})) is None
    assert next_rung(rungs, 0, frozenset()) is None
    assert next_rung(rungs, 3, frozenset(Kind)) is None


def test_the_admins_own_rungs_may_cure_anything() -> None:
    rungs = from_config(launch(2), [CustomRung(name="mine", gpus=1)])
    assert next_rung(rungs, 0, frozenset({Kind.MEMORY})) == 1
