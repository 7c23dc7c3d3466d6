"""How much of the weights is in: from bytes read, bytes on the GPUs and shards, whichever says most."""

from __future__ import annotations

import pytest

from mgpu_llm.core import progress, weights
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpusSampled, LineRead, ProcessesSampled
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.status import Count
from mgpu_llm.core.weights import RATE_OVER_S, Loading, after_sample, begin, bytes_per_s, left_s, percent
from tests.core.world import ASSIGNED, COMPILE, gpu, worker

TOTAL = 10_000


def loaded(*samples: tuple[float, float, float], shards: Count | None = None) -> Loading:
    """After samples of (at, bytes read, bytes held)."""
    loading = begin({}, 0.0)
    for at, read, held in samples:
        loading = after_sample(loading, {"read_bytes": read}, held, shards, TOTAL, at)
    return loading


# -- how much --------------------------------------------------------------------------------------------------------


def test_from_a_cold_disk_what_was_read_says_how_much_is_in() -> None:
    assert percent(loaded((0.0, 3800.0, 0.0)), TOTAL) == 38.0


def test_of_files_in_the_page_cache_nothing_is_read_and_the_gpus_say_it() -> None:
    assert percent(loaded((0.0, 0.0, 2500.0)), TOTAL) == 25.0


def test_where_neither_is_seen_the_shards_say_it() -> None:
    assert percent(loaded((0.0, 0.0, 0.0), shards=Count(done=3, total=8)), TOTAL) == 37.5


def test_whichever_says_most_is_nearest() -> None:
    assert percent(loaded((0.0, 1000.0, 2000.0), shards=Count(done=1, total=10)), TOTAL) == 20.0
    assert percent(loaded((0.0, 3000.0, 2000.0), shards=Count(done=1, total=10)), TOTAL) == 30.0
    assert percent(loaded((0.0, 3000.0, 2000.0), shards=Count(done=4, total=10)), TOTAL) == 40.0


def test_only_the_last_shard_ends_the_weights_because_other_things_are_read_too() -> None:
    assert percent(loaded((0.0, 99_999.0, 99_999.0)), TOTAL) == 99.0
    assert percent(loaded((0.0, 99_999.0, 0.0), shards=Count(done=8, total=8)), TOTAL) == 100.0


def test_it_never_goes_back() -> None:
    assert percent(loaded((0.0, 0.0, 5000.0), (2.0, 0.0, 100.0)), TOTAL) == 50.0


def test_what_was_read_and_held_before_does_not_count() -> None:
    loading = after_sample(begin({"read_bytes": 700.0}, 900.0), {"read_bytes": 900.0}, 950.0, None, TOTAL, 0.0)
    assert percent(loading, TOTAL) == 2.0
    less = after_sample(begin({"read_bytes": 0.0}, 900.0), {}, 100.0, None, TOTAL, 0.0)
    assert percent(less, TOTAL) == 0.0


def test_a_bar_of_no_shards_says_nothing() -> None:
    assert percent(loaded((0.0, 100.0, 0.0), shards=Count(done=0, total=0)), TOTAL) == 1.0


def test_before_the_first_sample_and_without_a_size_nothing_is_known() -> None:
    assert percent(begin({}, 0.0), TOTAL) is None
    assert percent(loaded((0.0, 1.0, 0.0)), 0) is None


# -- how fast, and how long still ------------------------------------------------------------------------------------


def test_the_rate_is_what_came_over_the_time_in_which_it_came() -> None:
    loading = loaded((0.0, 0.0, 0.0), (2.0, 200.0, 0.0), (4.0, 600.0, 0.0))
    assert bytes_per_s(loading) == 150.0
    assert left_s(loading, TOTAL) == pytest.approx(9400.0 / 150.0)


def test_one_point_is_no_rate() -> None:
    assert bytes_per_s(begin({}, 0.0)) is None
    assert bytes_per_s(loaded((0.0, 500.0, 0.0))) is None
    assert left_s(loaded((0.0, 500.0, 0.0)), TOTAL) is None


def test_points_closer_than_two_seconds_are_one() -> None:
    loading = loaded((0.0, 0.0, 0.0), (1.9, 5000.0, 0.0))
    assert loading.points == ((0.0, 0.0),)
    assert percent(loading, TOTAL) == 0.0


def test_the_rate_follows_a_change_within_its_window() -> None:
    fast = [(2.0 * step, 100.0 * step, 0.0) for step in range(20)]
    slow = [(38.0 + 2.0 * step, 1900.0 + step, 0.0) for step in range(1, 20)]
    assert bytes_per_s(loaded(*fast)) == pytest.approx(50.0)
    rate = bytes_per_s(loaded(*fast, *slow))
    assert rate == pytest.approx(0.5)
    assert max(at - loaded(*fast, *slow).points[0][0] for at, _ in loaded(*fast, *slow).points) <= RATE_OVER_S + 2.0


def test_where_nothing_comes_any_more_nobody_can_say_how_long_it_takes() -> None:
    loading = loaded((0.0, 500.0, 0.0), *((2.0 * step, 500.0, 0.0) for step in range(1, 20)))
    assert bytes_per_s(loading) == 0.0
    assert left_s(loading, TOTAL) is None


def test_after_a_time_in_which_nobody_looked_the_rate_is_unknown() -> None:
    assert bytes_per_s(loaded((0.0, 0.0, 0.0), (100.0, 900.0, 0.0))) is None


def test_two_points_of_the_same_moment_are_no_rate() -> None:
    assert bytes_per_s(Loading(read_from=0.0, held_from=0.0, points=((1.0, 0.0), (1.0, 5.0)))) is None


# -- as part of the heartbeat ----------------------------------------------------------------------------------------


def heart_in_weights(weights_bytes: int | None) -> Progress:
    heart = progress.begin(0.0, weights_bytes)
    heart = progress.after_gpus(heart, GpusSampled(at=0.0, attempt=1, gpus=(gpu(used_bytes=500),)))
    for at, read in ((0.0, 0), (1.0, 7_000)):
        sample = ProcessesSampled(at=at, attempt=1, processes=(worker(read_bytes=read),))
        heart = progress.after_processes(heart, sample)
    return progress.after_line(heart, LineRead(at=2.0, attempt=1, text=ASSIGNED))


def test_the_weights_begin_to_count_when_their_phase_does() -> None:
    heart = heart_in_weights(TOTAL)
    assert heart.phase is Phase.WEIGHTS
    assert heart.weights == Loading(read_from=7_000.0, held_from=500.0)
    for at, read in ((3.0, 8_000), (5.0, 9_000)):
        heart = progress.after_processes(
            heart, ProcessesSampled(at=at, attempt=1, processes=(worker(read_bytes=read),))
        )
    assert heart.weights is not None
    assert heart.weights.points == ((3.0, 1_000.0), (5.0, 2_000.0))


@pytest.mark.parametrize("size", [None, 0])
def test_where_the_size_of_the_files_is_unknown_only_the_shards_are_known(size: int | None) -> None:
    heart = heart_in_weights(size)
    heart = progress.after_processes(heart, ProcessesSampled(at=3.0, attempt=1, processes=(worker(read_bytes=9_000),)))
    assert heart.weights is None


def test_what_comes_after_the_weights_does_not_count_for_them() -> None:
    heart = heart_in_weights(TOTAL)
    heart = progress.after_processes(heart, ProcessesSampled(at=3.0, attempt=1, processes=(worker(read_bytes=8_000),)))
    heart = progress.after_line(heart, LineRead(at=4.0, attempt=1, text=COMPILE))
    later = progress.after_processes(heart, ProcessesSampled(at=9.0, attempt=1, processes=(worker(read_bytes=99_000),)))
    assert later.weights == heart.weights
    assert weights.percent(later.weights or begin({}, 0.0), TOTAL) == 10.0
