"""Whatever moves by its floor in each window keeps any load from being suspected; what moves by less does not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.core.events import GpuSample, ProcessSample
from mgpu_llm.core.signals import NOISE_FLOOR, WINDOW_S
from mgpu_llm.core.states import Killing, Starting
from tests.core.loads import GRAIN_S, few, seconds
from tests.core.looks import CONFIRMED_S
from tests.core.world import (
    ASSIGNED,
    COMPILE,
    NCCL,
    World,
    gpu,
    loading,
    worker,
)

PHASES = (NCCL, ASSIGNED, COMPILE)
LONGEST_GAP_S = 2.0
LASTS_S = 45.0

FIELDS = {
    "rss": "rss_bytes",
    "read_chars": "read_chars",
    "read_bytes": "read_bytes",
    "written_bytes": "written_bytes",
    "major_faults": "major_faults",
    "compilers": "cpu_s",
}
#: What was there before anything moved.
BASIS: dict[str, float] = {"rss": 1 << 30, "compilers": 1.0}


@dataclass(frozen=True)
class Course:
    """How a signal moves: by steps, each at a time of its own, so that every window has at least a floor's worth."""

    times: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, passed_s: float) -> float:
        index = bisect_right(self.times, passed_s)
        return self.values[index - 1] if index else 0.0


@st.composite
def courses(draw: st.DrawFn, floor: float, steps_a_window: tuple[int, ...] = (1, 2, 4, 8)) -> Course:
    """So many steps in each window that together they are a floor: one jump, or drips that are less."""
    steps = draw(st.sampled_from(steps_a_window))
    gaps = draw(st.lists(seconds(GRAIN_S, WINDOW_S / steps), min_size=10, max_size=40))
    times = [0.0, *accumulate(gaps)]
    while times[-1] < LASTS_S:
        times.append(times[-1] + WINDOW_S / steps)
    factors = draw(st.lists(st.sampled_from((1, 1, 1, 1, 1, 1, 2, 50)), min_size=10, max_size=20))
    jumps = (floor / steps * factors[number % len(factors)] for number in range(len(times)))
    return Course(times=tuple(times), values=tuple(accumulate(jumps)))


def sampled(world: World, gaps: list[float], make: Callable[[float], object]) -> World:
    """Looks with these gaps, over and over, until LASTS_S are over or the load is."""
    begun, number = world.at, 0
    while world.at - begun < LASTS_S and isinstance(world.state, Starting):
        world.at += gaps[number % len(gaps)]
        number += 1
        make(world.at - begun)
    return world


SAMPLE_GAPS = st.lists(seconds(0.25, LONGEST_GAP_S), min_size=1, max_size=8)


def processes(signal: str, value: float, shared: int) -> tuple[ProcessSample, ...]:
    """Two processes between which what a signal has moved by is shared out."""
    mine = value * shared / 4 if signal == "compilers" else int(value) * shared // 4
    rest = value - mine if signal == "compilers" else int(value) - int(mine)
    name = "cicc" if signal == "compilers" else "VLLM::Worker_TP"
    basis = BASIS.get(signal, 0)
    zero = {"read_bytes": 0, "written_bytes": 0}
    return tuple(
        worker(pid, **{**zero, "name": name, FIELDS[signal]: basis + part})  # type: ignore[arg-type]
        for pid, part in ((71, mine), (72, rest))
    )


def was_never_suspected(world: World) -> None:
    assert isinstance(world.state, Starting)
    assert world.announced("engine.suspected") == []


@pytest.mark.parametrize("signal", FIELDS)
@few
@given(data=st.data(), gaps=SAMPLE_GAPS, phase=st.sampled_from(PHASES), shared=st.integers(0, 4))
def test_a_process_signal_that_moves_by_its_floor_in_every_window_is_never_suspected(
    signal: str, data: st.DataObject, gaps: list[float], phase: str, shared: int
) -> None:
    course = data.draw(courses(NOISE_FLOOR[signal]))
    world = loading().say(phase).look(*processes(signal, 0.0, shared))
    sampled(world, gaps, lambda passed_s: world.look(*processes(signal, course.at(passed_s), shared)))
    was_never_suspected(world)


@pytest.mark.parametrize("whose", ["ours", "card"])
@few
@given(data=st.data(), gaps=SAMPLE_GAPS, phase=st.sampled_from(PHASES))
def test_gpu_memory_that_moves_by_its_floor_in_every_window_is_never_suspected(
    whose: str, data: st.DataObject, gaps: list[float], phase: str
) -> None:
    course = data.draw(courses(NOISE_FLOOR["gpu_memory"]))
    world = loading().say(phase).look()

    def held(passed_s: float) -> tuple[GpuSample, GpuSample]:
        used = int(course.at(passed_s))
        sample = gpu(used_bytes=(2 << 30) + used)
        return replace(sample, processes=((1027, used),)) if whose == "ours" else sample, gpu("GPU-b")

    world.look(gpus=held(0.0))
    sampled(world, gaps, lambda passed_s: world.look(gpus=held(passed_s)))
    was_never_suspected(world)


@pytest.mark.parametrize("kind", ["words", "bar", "births"])
@few
@given(data=st.data(), gaps=SAMPLE_GAPS, phase=st.sampled_from(PHASES))
def test_words_bars_and_births_within_the_patience_are_never_suspected(
    kind: str, data: st.DataObject, gaps: list[float], phase: str
) -> None:
    course = data.draw(courses(1.0, steps_a_window=(1,)))
    world = loading().say(phase).look()
    born = 0.0

    def moves(passed_s: float) -> None:
        nonlocal born
        number = course.at(passed_s)
        # In letters: what differs in digits alone is the same again, and of that so much counts and no more.
        letters = "".join(chr(97 + int(digit)) for digit in f"{number:.0f}")
        if kind == "words":
            world.say(letters)
        elif kind == "bar":
            world.say(f"Fetching 9999 files:   5%|#     | {number:.0f}/99999 [00:01<00:03]")
        others = (worker(9000, name=f"helper-{letters}", started=int(number)),) if kind == "births" else ()
        world.look(worker(), *others)

    sampled(world, gaps, moves)
    was_never_suspected(world)


@few
@given(
    gaps=SAMPLE_GAPS,
    phase=st.sampled_from(PHASES),
    share=st.integers(0, 80).map(lambda percent: percent / 100),
    begun=st.integers(0, 1000),
)
def test_movement_of_everything_below_every_floor_keeps_no_load_alive(
    gaps: list[float], phase: str, share: float, begun: int
) -> None:
    # A window is seen to be over by the first look after it, so that it may last a gap longer.
    per_s = {signal: share * floor / (WINDOW_S + LONGEST_GAP_S) for signal, floor in NOISE_FLOOR.items()}
    world = loading().say(phase, "bar:   5%|#     | 5/9 [00:01<00:03]")

    def drips(passed_s: float) -> None:
        def value(signal: str) -> int:
            return begun + int(per_s[signal] * passed_s)

        dripping = worker(
            rss_bytes=(1 << 30) + value("rss"),
            read_chars=value("read_chars"),
            read_bytes=value("read_bytes"),
            written_bytes=value("written_bytes"),
            major_faults=value("major_faults"),
            cpu_s=20.0 + passed_s,
        )
        compiler = worker(77, name="cicc", cpu_s=1.0 + per_s["compilers"] * passed_s)
        both = tuple(gpu(uuid, used_bytes=(2 << 30) + value("gpu_memory")) for uuid in ("GPU-a", "GPU-b"))
        world.look(dripping, compiler, gpus=both).say("bar:   5%|#     | 3/9 [00:01<00:03]")

    drips(0.0)
    patience_s = world.policy.patience[world.state.progress.phase] if isinstance(world.state, Starting) else 0.0
    begun_at = world.at
    sampled(world, gaps, drips)
    assert isinstance(world.state, Killing)
    assert world.at - begun_at <= patience_s + CONFIRMED_S + 3 * LONGEST_GAP_S
