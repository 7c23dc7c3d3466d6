"""Real starts, replayed, must be judged as people judged them: tests/data/recordings/expected.json says how."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mgpu_llm.core import recording, replay
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpusSampled, GpusUnobserved
from mgpu_llm.core.recording import Recording
from mgpu_llm.core.stall import UNCONFIRMED_FACTOR, UNOBSERVED_GPU_FACTOR
from tests.support import recordings

EXPECTED = recordings.expected()
#: One that has no file any more fails in the first test, not here.
JUDGED = [name for name in EXPECTED if name in recordings.names()]
HEALTHY = [name for name in JUDGED if EXPECTED[name].outcome == "healthy"]
STALLED = [name for name in JUDGED if EXPECTED[name].outcome == "stalled"]
#: A verdict comes this long after the last progress at most, without any stacks to confirm it as well as with them.
VERDICT_WITHIN_S = {"distributed-init": 20.0}
VERDICT_WITHIN_ELSEWHERE_S = 60.0
#: By how much the time of the last progress may differ: the people who measured it read every sample and line by eye.
MEASURED_WITHIN_S = 1.0


def verdict_after_s(name: str, report: replay.Report) -> float:
    """How long the verdict came after what people saw as the last progress."""
    last_progress_s = EXPECTED[name].last_progress_s
    assert last_progress_s is not None
    assert report.verdict_at is not None
    return report.verdict_at - last_progress_s


def test_every_recording_has_its_expectation_and_every_expectation_its_recording() -> None:
    assert sorted(EXPECTED) == list(recordings.names())


def test_a_stall_is_expected_with_the_time_of_its_last_progress_and_nothing_else_is() -> None:
    for name, row in EXPECTED.items():
        assert row.outcome in ("healthy", "stalled", "crashed", "running"), name
        assert (row.last_progress_s is not None) == (row.outcome == "stalled"), name
        assert (row.cause is None) == (row.outcome in ("healthy", "running")), name


@pytest.mark.parametrize("name", JUDGED)
def test_a_recording_is_judged_as_people_judged_it(name: str) -> None:
    report = recordings.judged(name)
    row = EXPECTED[name]
    assert (report.outcome, report.cause, report.phase) == (row.outcome, row.cause, row.phase)


@pytest.mark.parametrize("name", STALLED)
def test_a_stall_is_called_one_soon_after_the_last_progress(name: str) -> None:
    report = recordings.judged(name)
    assert report.last_progress_at == pytest.approx(EXPECTED[name].last_progress_s, abs=MEASURED_WITHIN_S)
    assert 0 < verdict_after_s(name, report) <= VERDICT_WITHIN_S.get(report.phase, VERDICT_WITHIN_ELSEWHERE_S)
    assert report.suspicions[-1].cleared_s is None


@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_start_is_even_suspected(name: str) -> None:
    report = recordings.judged(name)
    assert report.suspicions == ()
    for phase in report.phases:
        assert phase.longest_quiet_s <= phase.patience_s / 2, phase


@pytest.mark.parametrize("factor", [2.0, 5.0])
@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_start_is_stalled_on_a_host_that_is_slower(name: str, factor: float) -> None:
    slow = recordings.slowed(recordings.load(name), factor)
    report = replay.judge(slow)
    assert (report.outcome, report.cause) == ("healthy", None)
    assert report.ended_at == pytest.approx(slow.ended_at)
    # The one that was stopped for 12 of its 41 s is the shortest of them.
    assert slow.ended_at > 0.7 * factor * recordings.load(name).ended_at


@pytest.mark.parametrize("name", HEALTHY)
def test_the_phases_of_a_healthy_start_follow_each_other_to_its_end(name: str) -> None:
    report = recordings.judged(name)
    names = [phase.name for phase in report.phases]
    assert names == sorted(names, key=[phase.label for phase in Phase].index)
    said = {"boot", "weights", "warm-up", "api"} if recordings.speaks(recordings.load(name)) else {"boot"}
    assert said <= set(names)
    for before, after in pairwise(report.phases):
        assert after.began_s == pytest.approx(before.began_s + before.took_s)
    assert report.phases[-1].began_s + report.phases[-1].took_s == pytest.approx(report.ended_at, abs=1.0)


def _without_gpus(recorded: Recording) -> Recording:
    """The same start where NVML never answers."""
    rows = [
        [
            {key: value for key, value in row.items() if key != "gpus"},
            {"t": row["t"], "kind": "unobserved", "why": "NVML did not answer"},
        ]
        if row.get("gpus")
        else [row]
        for row in recorded.rows
    ]
    return replace(recorded, rows=tuple(row for several in rows for row in several))


@pytest.mark.parametrize("name", [name for name in STALLED if recordings.load(name).has_gpus])
def test_a_stall_is_noticed_without_sight_of_the_gpus_too_only_later(name: str) -> None:
    recorded = recordings.load(name)
    blind = _without_gpus(recorded)
    happened = list(recording.events(blind))
    assert any(isinstance(event, GpusUnobserved) for event in happened)
    assert not any(isinstance(event, GpusSampled) for event in happened)
    seen, unseen = recordings.judged(name), replay.judge(blind)
    if unseen.outcome == "running":
        needed_s = UNOBSERVED_GPU_FACTOR * UNCONFIRMED_FACTOR * seen.phases[-1].patience_s
        assert recorded.ended_at - seen.last_progress_at < needed_s, "the recording lasted long enough for a verdict"
        return
    # What the GPUs do tells causes apart that look the same without them.
    unknown = {"nccl-p2p", "nccl-bootstrap", "custom-all-reduce"}
    assert unseen.outcome == "stalled"
    assert unseen.cause == (f"stalled-in-{seen.phase}" if seen.cause in unknown else seen.cause)
    assert verdict_after_s(name, seen) < verdict_after_s(name, unseen)
    limit_s = VERDICT_WITHIN_S.get(seen.phase, VERDICT_WITHIN_ELSEWHERE_S)
    assert verdict_after_s(name, unseen) <= UNOBSERVED_GPU_FACTOR * limit_s


@pytest.mark.parametrize("name", [name for name in HEALTHY if recordings.load(name).has_gpus])
def test_no_healthy_start_is_stalled_without_sight_of_the_gpus(name: str) -> None:
    assert replay.judge(_without_gpus(recordings.load(name))).outcome == "healthy"
