"""What the ladder makes of a model that does not fit everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import recorded_policy
from mgpu_llm.core.case import Failure
from mgpu_llm.core.cures import Out, find
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import BASE, Ladder
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.recording import RecordingError, cut
from mgpu_llm.core.remedies import Remedy, Want
from mgpu_llm.core.states import Policy, Run

TWO = Ladder(base=Launch(gpus=("0", "1"), tensor_parallel=2, utilisation=0.9), sizes=(1,), lowest={2: 0.82, 1: 0.88})


def lower(ladder: Ladder, rung: str = "base", **figures: float) -> Remedy | Out:
    found = Diagnosis(cause="x", outcome="crashed", summary="", advice="", wants=(Want.MEMORY_LOWER,), figures=figures)
    return find(Want.MEMORY_LOWER, ladder, [Failure(rung=ladder.rung(rung), found=found)])


def test_no_utilisation_is_proposed_at_which_weights_and_cache_do_not_fit() -> None:
    assert isinstance(found := lower(TWO), Remedy)
    assert found.utilisation == 0.85
    refused = Out(what="less memory utilisation", why="weights and cache do not fit at 0.8")
    assert lower(TWO, "utilisation-0.85") == refused
    assert lower(TWO, free=83.0, total=100.0) == refused


def test_fewer_gpus_have_a_bound_of_their_own() -> None:
    assert lower(TWO, "tp-1") == Out(what="less memory utilisation", why="weights and cache do not fit at 0.85")
    assert isinstance(lower(replace(TWO, lowest={2: 0.89}), "tp-1"), Remedy)


def test_below_the_floor_it_is_the_floor_that_is_named() -> None:
    low = replace(TWO, floor=0.9)
    assert lower(low) == Out(what="less memory utilisation", why="0.9 is as low as may be")


def test_a_recording_keeps_the_bounds_and_one_without_them_has_none() -> None:
    row = recorded_policy.header(Policy(ladder=TWO), Run(attempt=1, rung=BASE))
    again = recorded_policy.policy_of(cut([row]))
    assert again.ladder.lowest == TWO.lowest
    ladder = {name: value for name, value in row["ladder"].items() if name != "lowest"}
    older = recorded_policy.policy_of(cut([{**row, "ladder": ladder}]))
    assert older.ladder.lowest == {}


@pytest.mark.parametrize("lowest", [[[0, 0.5]], [[2, -1]], [[2]]])
def test_bounds_that_make_no_sense_are_refused(lowest: object) -> None:
    row = recorded_policy.header(Policy(ladder=TWO), Run(attempt=1, rung=BASE))
    with pytest.raises(RecordingError, match="its first row is broken"):
        recorded_policy.policy_of(cut([{**row, "ladder": {**row["ladder"], "lowest": lowest}}]))
