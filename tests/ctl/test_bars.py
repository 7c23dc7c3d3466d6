from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mgpu_llm.core.status import PhaseStatus, Status
from mgpu_llm.ctl.bars import Canvas, load_lines
from mgpu_llm.ctl.words import Page, cells
from tests.ctl.samples import EIGHT_GPUS, LOADING, PHASES, STALLED

PAGE = Page(colour=False, width=80)
CANVAS = Canvas(page=PAGE, width=80, height=24)


def row(status: Status, name: str, canvas: Canvas = CANVAS) -> str:
    return next(line for line in load_lines(status, canvas) if line.startswith(f"{name:<16}  "))


def compiling(*, took_s: float, usual_s: float | None) -> Status:
    def at(phase: PhaseStatus) -> PhaseStatus:
        if phase.name == "compile":
            return replace(phase, standing="current", took_s=took_s, usual_s=usual_s)
        return replace(phase, standing="to-come" if phase.took_s is None else "done", percent=None)

    return replace(LOADING, phase="compile", weights_bytes_per_s=None, phases=tuple(at(phase) for phase in PHASES))


def test_a_phase_that_cannot_be_counted_is_guessed_by_time_and_looks_guessed() -> None:
    assert row(compiling(took_s=37.0, usual_s=74.0), "compile") == (
        "compile           ▒▒▒▒▒▒▒▒▒▒───────────  ~50 %  37 s         usually 1 min 14 s"
    )


def test_a_guess_never_says_that_all_is_done() -> None:
    late = row(compiling(took_s=300.0, usual_s=74.0), "compile")
    assert late == "compile           ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒─  ~99 %  5 min        usually 1 min 14 s"


@pytest.mark.parametrize("usual_s", [None, 0.0])
def test_of_a_phase_of_which_nothing_is_known_a_block_runs_to_and_fro_and_keeps_its_size(usual_s: float | None) -> None:
    seen = [row(compiling(took_s=half / 2, usual_s=usual_s), "compile")[18:39] for half in range(200)]
    assert all(bar.count("▒") == 4 and bar.count("─") == 17 and "▒▒▒▒" in bar for bar in seen)
    places = [bar.index("▒") for bar in seen]
    assert {min(places), max(places)} <= {0, 1, 16, 17}
    assert all(abs(one - next_one) <= 2 for one, next_one in pairwise(places))


def test_a_little_is_not_nothing_and_almost_all_is_not_all() -> None:
    def with_percent(percent: float) -> str:
        phases = tuple(replace(phase, percent=percent if phase.percent else None) for phase in PHASES)
        return row(replace(LOADING, phases=phases), "weights")[18:46]

    assert with_percent(0.1) == "█────────────────────    0 %"
    assert with_percent(99.9) == "████████████████████─   99 %"
    assert with_percent(100.0) == "█████████████████████  100 %"


def test_a_phase_that_was_passed_over_has_an_empty_bar() -> None:
    boot, *others = PHASES
    status = replace(LOADING, phases=(replace(boot, took_s=None), *others))
    assert row(status, "boot") == f"boot              {'─' * 21}         not seen     usually 21 s"


def test_a_gpu_whose_size_is_not_known_has_no_bar_and_one_not_observed_says_why() -> None:
    status = replace(
        LOADING,
        gpus=(replace(EIGHT_GPUS[1], total_bytes=None, utilisation_percent=None),),
        gpus_unobserved="NVML is late",
    )
    *_, gpu, why = load_lines(status, CANVAS)
    assert gpu.split() == ["GPU-1a2b3c4d", "9.0", "GiB", "used"]
    assert why == "GPUs not observed now: NVML is late"


def test_on_80_by_24_eight_gpus_and_a_suspicion_leave_a_line_for_the_last_failed_attempt() -> None:
    failed = tuple(replace(STALLED, number=number) for number in (1, 2, 3))
    lines = load_lines(replace(LOADING, attempts=failed, suspicion="looking twice where its threads stand"), CANVAS)
    assert len(lines) == 24
    assert lines[-2] == "3 failed attempts: mgpuctl attempts"
    assert lines[-1] == "  3 on rung base: stalled in distributed-init after 1 min 9 s: both GPUs spin in …"[:79] + "…"


@pytest.mark.parametrize("width", [44, 60, 71, 72, 80, 119, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_at_every_size_the_picture_stays_within_it(width: int, encoding: str) -> None:
    page = Page(colour=False, width=width, encoding=encoding)
    failed = tuple(replace(STALLED, number=number) for number in range(1, 9))
    status = replace(LOADING, attempts=failed, model="/models/模型" * 20, suspicion="looking twice at its threads")
    for shown in (status, replace(status, gpus=()), replace(status, attempts=()), compiling(took_s=9.0, usual_s=None)):
        for height in range(13, 50):
            lines = load_lines(shown, Canvas(page=page, width=width, height=height))
            assert len(lines) <= height
            # Below 56 columns the ends of the GPUs' lines are cut off by the terminal.
            assert all(cells(line) <= max(width, 56) for line in lines)


def test_even_on_a_terminal_of_one_cell_there_is_something_to_draw() -> None:
    assert load_lines(LOADING, Canvas(page=PAGE, width=1, height=1))
