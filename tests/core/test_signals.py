"""The measured signals: what each is summed from, and how much of it is movement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mgpu_llm.core.events import GpuSample, ProcessSample
from mgpu_llm.core.signals import (
    MIB,
    NOISE_FLOOR,
    WINDOW_S,
    Mark,
    gpu_memory,
    is_compiler,
    measured,
    process_totals,
)
from mgpu_llm.core.states import Killing, Starting
from tests.core.world import gpu, loading, worker

SMALLEST_STEP = {signal: 0.01 if signal == "compilers" else 1.0 for signal in NOISE_FLOOR}
OURS = 1027


# -- floors and the window -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", NOISE_FLOOR)
@pytest.mark.parametrize("direction", [1, -1])
def test_a_change_by_the_floor_is_movement_whatever_its_direction(signal: str, direction: int) -> None:
    marks = {signal: Mark(at=0.0, value=1e9)}
    now = 1e9 + direction * NOISE_FLOOR[signal]
    assert measured(marks, {signal: now}, 1.0) == ({signal}, {signal: Mark(at=1.0, value=now)})


@pytest.mark.parametrize("signal", NOISE_FLOOR)
def test_a_change_by_less_is_none_and_keeps_the_mark_as_long_as_its_window_lasts(signal: str) -> None:
    marks = {signal: Mark(at=0.0, value=0.0)}
    below = NOISE_FLOOR[signal] - SMALLEST_STEP[signal]
    for at in (1.0, WINDOW_S):
        assert measured(marks, {signal: below}, at) == (set(), marks)


@pytest.mark.parametrize("signal", NOISE_FLOOR)
def test_a_window_that_passes_without_movement_begins_anew_so_that_a_drip_never_adds_up(signal: str) -> None:
    marks, value, moved = {signal: Mark(at=0.0, value=0.0)}, 0.0, set[str]()
    for number in range(1, 100):
        at = number * 0.5
        value += NOISE_FLOOR[signal] * 0.5 / (WINDOW_S + 1.0)
        now, fresh = measured(marks, {signal: value}, at)
        marks, moved = dict(fresh), moved | now
    assert value > 5 * NOISE_FLOOR[signal]
    assert moved == set()


def test_what_is_seen_for_the_first_time_has_not_moved() -> None:
    assert measured({}, {"rss": 9e9}, 3.0) == (set(), {"rss": Mark(at=3.0, value=9e9)})


def test_what_is_not_seen_keeps_its_mark() -> None:
    marks = {"gpu_memory GPU-a card": Mark(at=0.0, value=5.0)}
    assert measured(marks, {}, 100.0) == (set(), marks)


def test_every_gpu_is_a_signal_of_its_own_with_the_floor_of_gpu_memory() -> None:
    marks = {name: Mark(at=0.0, value=0.0) for name in ("gpu_memory GPU-a card", "gpu_memory GPU-b ours")}
    values = {"gpu_memory GPU-a card": 1.0 * MIB, "gpu_memory GPU-b ours": 1.0 * MIB - 1}
    assert measured(marks, values, 1.0)[0] == {"gpu_memory GPU-a card"}


# -- the totals of the processes -------------------------------------------------------------------------------------

COUNTERS = {
    "read_chars": "read_chars",
    "read_bytes": "read_bytes",
    "written_bytes": "written_bytes",
    "major_faults": "major_faults",
}


@pytest.mark.parametrize(("signal", "field"), COUNTERS.items())
def test_a_counter_adds_what_it_grew_by_in_every_process_and_never_shrinks(signal: str, field: str) -> None:
    def counted(pid: int, value: int) -> ProcessSample:
        return replace(worker(pid), **{field: value})  # type: ignore[arg-type]

    grown = [(counted(1, 10), counted(1, 15)), (counted(2, 100), counted(2, 130))]
    assert process_totals({}, grown)[signal] == 35.0
    assert process_totals({signal: 5.0}, [(counted(1, 10), counted(1, 4))])[signal] == 5.0


@pytest.mark.parametrize("field", ["read_chars", "read_bytes", "written_bytes"])
@pytest.mark.parametrize(("before", "now"), [(None, 1 << 30), (1 << 30, None), (None, None)])
def test_a_counter_that_may_not_be_read_is_unknown_and_no_work(field: str, before: int | None, now: int | None) -> None:
    pair = (replace(worker(), **{field: before}), replace(worker(), **{field: now}))  # type: ignore[arg-type]
    assert process_totals({}, [pair])[field] == 0.0


def test_memory_counts_where_it_grows_and_what_the_kernel_takes_from_another_process_is_no_work() -> None:
    pairs = [
        (worker(1, rss_bytes=5 * MIB), worker(1, rss_bytes=9 * MIB)),
        (worker(2, rss_bytes=9 * MIB), worker(2, rss_bytes=5 * MIB)),
    ]
    assert process_totals({}, pairs)["rss"] == 4.0 * MIB


def test_only_the_processor_time_of_compilers_is_work() -> None:
    pairs = [
        (worker(1, name="cicc", cpu_s=1.0), worker(1, name="cicc", cpu_s=1.75)),
        (worker(2, cpu_s=1.0), worker(2, cpu_s=9.0)),
        (worker(3, name="ptxas", cpu_s=4.0), worker(3, name="ptxas", cpu_s=4.0)),
    ]
    assert process_totals({}, pairs)["compilers"] == 0.75


def test_totals_without_any_pair_are_those_so_far_and_gpu_memory_is_none_of_them() -> None:
    assert process_totals({"rss": 7.0}, []) == {
        "rss": 7.0, "rss_high": 0.0, "read_chars": 0.0, "read_bytes": 0.0, "written_bytes": 0.0, "major_faults": 0.0,
        "compilers": 0.0,
    }  # fmt: skip


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nvcc", "cicc", "ptxas", "nvlink", "fatbinary", "cudafe++", "ninja", "cc1plus", "cc1", "lto1", "collect2", "g++", "c++",
        "gcc", "clang", "clang++", "ld", "as", "gcc-real", "g++-12", "clang-17", "gcc-13.2", "x86_64-linux-gnu-gcc",
        "x86_64-linux-gnu-g++-12", "aarch64-linux-gnu-as", "NVCC",
    ],
)  # fmt: skip
def test_a_compiler_is_known_by_its_name(name: str) -> None:
    assert is_compiler(name)


@pytest.mark.parametrize(
    "name",
    ["", "python", "VLLM::Worker_TP0", "VLLM::EngineCor", "bash", "asd", "ldconfig", "nvcc.sh", "gccgo-x", "my gcc", "class",
     "ninja-build-watch", "cc2", "pt_main_thread"],
)  # fmt: skip
def test_what_only_resembles_a_compiler_is_none(name: str) -> None:
    assert not is_compiler(name)


# -- whose GPU memory counts -----------------------------------------------------------------------------------------


def held(*processes: tuple[int, int | None], used_bytes: int = 30 * MIB) -> GpuSample:
    return replace(gpu(used_bytes=used_bytes), processes=processes)


@pytest.mark.parametrize(
    ("sample", "signal", "value"),
    [
        (held((OURS, 5 * MIB), (9, 20 * MIB)), "gpu_memory GPU-a ours", 5 * MIB),
        (held((OURS, 5 * MIB), (1028, 6 * MIB)), "gpu_memory GPU-a ours", 11 * MIB),
        (held((OURS, None), (1028, 6 * MIB)), "gpu_memory GPU-a ours", 6 * MIB),
        (held((OURS, None)), "gpu_memory GPU-a card", 30 * MIB),
        (held((900_001, 5 * MIB)), "gpu_memory GPU-a card", 30 * MIB),
        (held(), "gpu_memory GPU-a card", 30 * MIB),
        (gpu(used_bytes=30 * MIB), "gpu_memory GPU-a card", 30 * MIB),
    ],
    ids=["ours beside others", "two of ours", "one of ours unknown", "ours unknown", "pids of another namespace", "nobody yet",
         "driver names none"],
)  # fmt: skip
def test_what_our_processes_hold_counts_before_the_whole_card(sample: GpuSample, signal: str, value: int) -> None:
    assert gpu_memory([sample], frozenset({OURS, 1028})) == {signal: float(value)}


def _watched(holders: Callable[[int], GpuSample]) -> Starting | Killing:
    """After a minute in which only GPU memory may move; `holders` is asked for the n-th look."""
    world = loading()
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        world.look(gpus=(holders(looks), gpu("GPU-b")))

    world.watch(60.0, look)
    assert isinstance(world.state, Starting | Killing)
    return world.state


def test_our_allocations_keep_a_load_alive_on_a_card_that_is_shared() -> None:
    state = _watched(lambda number: held((OURS, number * MIB), (9, (9000 - number) * MIB), used_bytes=9000 * MIB))
    assert isinstance(state, Starting)


def test_another_tenants_allocations_are_not_our_progress() -> None:
    state = _watched(lambda number: held((OURS, 5 * MIB), (9, number * 500 * MIB), used_bytes=(number + 1) * 500 * MIB))
    assert isinstance(state, Killing)


def test_in_a_container_whose_pids_the_driver_counts_otherwise_the_whole_card_keeps_a_load_alive() -> None:
    state = _watched(lambda number: held((900_001, number * 500 * MIB), used_bytes=number * 500 * MIB))
    assert isinstance(state, Starting)


def test_our_first_allocation_is_a_new_signal_and_what_follows_is_measured_against_it() -> None:
    before = gpu_memory([held((9, 20 * MIB))], frozenset({OURS}))
    after = gpu_memory([held((9, 20 * MIB), (OURS, 10 * MIB))], frozenset({OURS}))
    more = gpu_memory([held((9, 20 * MIB), (OURS, 11 * MIB))], frozenset({OURS}))
    _, marks = measured({}, before, 0.0)
    moved, marks = measured(marks, after, 1.0)
    assert moved == set()
    assert measured(marks, more, 2.0)[0] == {"gpu_memory GPU-a ours"}
