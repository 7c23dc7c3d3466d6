"""The simulation behind docs/diagnosis.md: what it calls a cure, a right end and a wrong one."""

from __future__ import annotations

from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.remedies import DEFAULT_ORDER, Want
from tests.bench.struggle import Failure, Struggle, struggles

STOP = Want.STOP


def fought(*wants: Want, cures: tuple[Want, ...], served: bool = False, **changes: object) -> tuple[Struggle, ...]:
    """A cause with these wants, where each of `cures` is one thing that it may really be."""
    found = Diagnosis(cause="x", outcome="crashed", summary="", advice="", wants=wants, **changes)  # type: ignore[arg-type]
    return struggles(Failure(found=found, ways=[(cure,) for cure in cures], served=served))


def test_it_serves_on_the_first_rung_that_has_the_cure() -> None:
    (one,) = fought(Want.TRANSPORT, Want.FEWER_GPUS, cures=(Want.TRANSPORT,))
    assert (one.attempts, one.status, one.wrong, one.dear, one.at_once) == (2, None, "", "", True)
    (late,) = fought(*DEFAULT_ORDER, cures=(Want.MEMORY_LOWER,))
    assert (late.attempts, late.status, late.at_once) == (3, None, False)


def test_the_settings_tell_and_not_the_names() -> None:
    (one,) = fought(Want.TRANSPORT, cures=(Want.CUSTOM_ALL_REDUCE,))
    assert (one.attempts, one.status) == (2, None), "without peer-to-peer there is no custom all-reduce either"
    (other,) = fought(Want.CUSTOM_ALL_REDUCE, cures=(Want.TRANSPORT,))
    assert other.wrong == "given up although transport would cure"


def test_one_rank_has_no_trouble_with_others_but_that_is_dear() -> None:
    (one,) = fought(Want.FEWER_GPUS, cures=(Want.NETWORK_INTERFACE,))
    assert (one.attempts, one.status, one.dear) == (2, None, "one GPU although network-interface would do")
    (meant,) = fought(Want.FEWER_GPUS, cures=(Want.FEWER_GPUS,))
    assert meant.dear == ""


def test_what_was_of_the_moment_is_over_at_the_second_attempt() -> None:
    (again,) = fought(Want.PLAIN_RETRY, cures=(Want.PLAIN_RETRY,))
    assert (again.attempts, again.status, again.dear) == (2, None, "")
    (changed,) = fought(Want.EAGER, cures=(Want.PLAIN_RETRY,))
    assert changed.dear == "settings changed although the same again would do"


def test_where_nothing_helps_it_must_stop_at_once_and_change_nothing() -> None:
    (right,) = fought(STOP, cures=(STOP,))
    assert (right.attempts, right.status, right.wrong, right.at_once) == (1, 65, "", True)
    (changed,) = fought(Want.EAGER, STOP, cures=(STOP,))
    assert changed.wrong == "settings changed although nothing helps"
    (late,) = fought(Want.PLAIN_RETRY, cures=(STOP,))
    assert late.wrong == "stopped with 69 after 2 attempts although nothing helps"


def test_what_is_as_likely_may_be_tried_first() -> None:
    eager, stop = fought(Want.EAGER, STOP, cures=(Want.EAGER, STOP))
    assert (eager.attempts, eager.status) == (2, None)
    assert (stop.attempts, stop.status, stop.wrong) == (2, 69, "")


def test_a_release_that_is_needed_is_told_and_what_follows_it() -> None:
    (one,) = fought(Want.MEMORY_RAISE, Want.CONTEXT_LENGTH, cures=(Want.CONTEXT_LENGTH,))
    assert (one.attempts, one.status, one.released, one.wrong) == (2, 69, 3, "")


def test_each_gpu_may_be_the_one_at_fault_unless_it_is_known() -> None:
    first, second = fought(Want.OTHER_GPU, Want.FEWER_GPUS, cures=(Want.OTHER_GPU,))
    assert (first.attempts, second.attempts) == (3, 2)
    (known,) = fought(Want.OTHER_GPU, Want.FEWER_GPUS, cures=(Want.OTHER_GPU,), rank=0)
    assert known.attempts == 2


def test_memory_is_low_enough_when_it_fits_into_what_is_free() -> None:
    (one,) = fought(Want.MEMORY_LOWER, cures=(Want.MEMORY_LOWER,), figures={"free": 79.0, "total": 100.0})
    assert (one.attempts, one.status) == (2, None)
    (none,) = fought(Want.MEMORY_LOWER, cures=(Want.MEMORY_LOWER,), figures={"free": 50.0, "total": 100.0})
    assert none.wrong == "given up although memory-lower would cure"


def test_an_engine_that_dies_while_serving_changes_rungs_once_it_has_died_often_enough() -> None:
    again, transport = fought(*DEFAULT_ORDER, cures=(Want.PLAIN_RETRY, Want.TRANSPORT), served=True)
    assert (again.attempts, transport.attempts) == (2, 4)
