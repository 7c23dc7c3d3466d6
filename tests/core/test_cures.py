"""Which remedy follows which failure. A failure is written as a rung, the cause's wants, and what else is known of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import remedies
from mgpu_llm.core.case import Failure
from mgpu_llm.core.cures import Choice, Out, choose, find
from mgpu_llm.core.diagnosis import TABLE, Diagnosis
from mgpu_llm.core.ladder import BASE, Ladder, Nvlink, Rung
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, DEFAULT_ORDER, Area, Remedy, Want

FOUR = Launch(gpus=("0", "1", "2", "3"), tensor_parallel=4, utilisation=0.9)
LADDER = Ladder(base=FOUR, sizes=(2, 1))
ON_CPU = Ladder(base=Launch(gpus=None, tensor_parallel=2, utilisation=None), sizes=(1,))
ONE = Ladder(base=Launch(gpus=("0",), tensor_parallel=1, utilisation=0.9), no_sizes="there is one GPU")


def cause(*wants: Want, rank: int | None = None, name: str = "x", **figures: float) -> Diagnosis:
    return Diagnosis(cause=name, outcome="crashed", summary="", advice="", wants=wants, rank=rank, figures=figures)


def after(found: Diagnosis, on: str = "base", ladder: Ladder = LADDER) -> Failure:
    return Failure(rung=ladder.rung(on), found=found)


def walk(found: Diagnosis, ladder: Ladder = LADDER) -> list[str]:
    """The rungs that follow one another where every attempt fails for the same cause; "again" is the same once more."""
    rung, failures, walked = BASE, list[Failure](), list[str]()
    while len(walked) < 20:
        failures.append(Failure(rung=rung, found=found))
        choice = choose(ladder, failures)
        if choice.remedy is None and not choice.retry:
            return walked
        rung = rung.plus(choice.remedy) if choice.remedy else rung
        walked.append(rung.name if choice.remedy else "again")
    raise AssertionError(f"without an end: {walked}")


def chosen(*failures: Failure, ladder: Ladder = LADDER) -> str | None:
    remedy = choose(ladder, failures).remedy
    return None if remedy is None else remedy.name


# -- the order ---------------------------------------------------------------------------------------------------------


def test_a_cause_that_nobody_knows_takes_the_default_order_each_on_top_of_the_last() -> None:
    assert walk(cause(*DEFAULT_ORDER)) == [
        "p2p-off",
        "p2p-off+utilisation-0.85",
        "p2p-off+utilisation-0.80",
        "p2p-off+utilisation-0.80+tp-2",
        "p2p-off+utilisation-0.80+tp-1",
    ]


def test_a_known_cause_takes_only_what_it_wants_in_its_own_order() -> None:
    assert walk(cause(Want.EAGER, Want.NVLS)) == ["eager", "eager+nvls-off"]
    assert walk(cause(Want.NVLS, Want.EAGER)) == ["nvls-off", "nvls-off+eager"]


def test_the_same_is_tried_again_as_often_as_the_cause_wants_and_at_the_place_where_it_wants_it() -> None:
    assert walk(cause(Want.PLAIN_RETRY, Want.PLAIN_RETRY)) == ["again", "again"]
    assert walk(cause(Want.PLAIN_RETRY, Want.EAGER)) == ["again", "eager"]
    assert walk(cause(Want.NETWORK_INTERFACE, Want.PLAIN_RETRY)) == ["loopback", "again"]


def test_another_cause_does_not_use_up_the_tries_of_this_one() -> None:
    crash, stall = cause(Want.PLAIN_RETRY, name="a"), cause(Want.PLAIN_RETRY, Want.TRANSPORT, name="b")
    assert choose(LADDER, [after(stall), after(crash)]).retry
    assert choose(LADDER, [after(crash), after(stall), after(crash)]) == Choice()


def test_an_engine_that_had_served_is_not_tried_again_for_its_cause() -> None:
    assert choose(LADDER, [after(cause(Want.PLAIN_RETRY, Want.EAGER))], again=False).remedy == remedies.EAGER
    assert choose(LADDER, [after(cause(Want.PLAIN_RETRY))], again=False) == Choice()


@pytest.mark.parametrize("wants", [(Want.STOP,), (Want.STOP, Want.EAGER), ()])
def test_where_nothing_helps_nothing_is_tried(wants: tuple[Want, ...]) -> None:
    assert choose(LADDER, [after(cause(*wants))]) == Choice()


def test_what_may_help_before_the_end_is_tried_before_it() -> None:
    assert walk(cause(Want.EAGER, Want.STOP)) == ["eager"]


@pytest.mark.parametrize("row", [row for row in TABLE if row.wants], ids=lambda row: row.id)
@pytest.mark.parametrize("ladder", [LADDER, ON_CPU, ONE, replace(LADDER, areas=frozenset(Area), context=8192)])
def test_every_row_of_the_table_comes_to_an_end(row: object, ladder: Ladder) -> None:
    walked = walk(cause(*row.wants), ladder)  # type: ignore[attr-defined]
    named = [name for name in walked if name != "again"]
    assert len(named) == len(set(named)), "no rung twice"


# -- transports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvlink", "walked"),
    [
        (Nvlink.NONE, ["p2p-off"]),
        (Nvlink.SOME, ["p2p-nvlink-only", "p2p-nvlink-only+p2p-off"]),
        (Nvlink.ALL, ["nvlink-gentle", "nvlink-gentle+p2p-off"]),
    ],
)
def test_where_there_is_nvlink_it_is_given_up_last(nvlink: Nvlink, walked: list[str]) -> None:
    assert walk(cause(Want.TRANSPORT), replace(LADDER, nvlink=nvlink)) == walked


@pytest.mark.parametrize(
    ("want", "name"),
    [
        (Want.CUSTOM_ALL_REDUCE, "custom-all-reduce-off"),
        (Want.NVLS, "nvls-off"),
        (Want.CUMEM, "cumem-off"),
        (Want.SHM, "shm-off"),
        (Want.NETWORK_INTERFACE, "loopback"),
    ],
)
def test_each_transport_is_switched_off_once_and_not_where_there_is_one_rank(want: Want, name: str) -> None:
    assert walk(cause(want)) == [name]
    (out,) = choose(ONE, [after(cause(want), ladder=ONE)]).outs
    assert (out.why, out.moot, out.forbidden) == ("there is one rank only", True, False)


def test_what_the_admin_has_switched_off_already_is_not_switched_off_again() -> None:
    off = replace(LADDER, base=remedies.P2P_OFF.over(FOUR))
    assert chosen(after(cause(*DEFAULT_ORDER), ladder=off), ladder=off) == "utilisation-0.85"
    half = replace(LADDER, base=replace(FOUR, env={"NCCL_P2P_DISABLE": "1"}))
    assert chosen(after(cause(*DEFAULT_ORDER), ladder=half), ladder=half) == "p2p-off"
    (out,) = choose(off, [after(cause(Want.TRANSPORT), ladder=off)]).outs
    assert (out.why, out.moot) == ("it is so already", True)


def test_ranks_of_a_pipeline_talk_too() -> None:
    deep = replace(ONE, pipeline_parallel=2)
    assert chosen(after(cause(Want.TRANSPORT), ladder=deep), ladder=deep) == "p2p-off"


def test_the_loopback_interface_is_for_one_host() -> None:
    (out,) = choose(replace(LADDER, one_host=False), [after(cause(Want.NETWORK_INTERFACE))]).outs
    assert "other hosts take part" in out.why


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("utilisation", "step", "floor", "values"),
    [
        (0.9, 0.05, 0.8, ["0.85", "0.80"]),
        (0.9, 0.05, 0.7, ["0.85", "0.80", "0.75", "0.70"]),
        (0.9, 0.05, 0.81, ["0.85"]),
        (0.92, 0.05, 0.8, ["0.87", "0.82"]),
        (0.8, 0.05, 0.8, []),
        (0.7, 0.05, 0.8, []),
        (0.3, 0.1, 0.1, ["0.20", "0.10"]),
    ],
)
def test_utilisation_is_lowered_in_steps_and_never_below_its_floor(
    utilisation: float, step: float, floor: float, values: list[str]
) -> None:
    ladder = replace(LADDER, base=replace(FOUR, utilisation=utilisation), step=step, floor=floor)
    assert walk(cause(Want.MEMORY_LOWER), ladder) == [f"utilisation-{value}" for value in values]


def test_where_memory_is_only_a_guess_it_is_lowered_two_steps_and_no_further() -> None:
    assert [name for name in walk(cause(*DEFAULT_ORDER)) if name.endswith(("0.80", "0.75"))] == [
        "p2p-off+utilisation-0.80"
    ]


@pytest.mark.parametrize(
    ("free", "name"),
    [(100.0, "utilisation-0.85"), (80.0, "utilisation-0.75"), (77.1, "utilisation-0.75"), (76.9, "utilisation-0.70")],
)
def test_what_vllm_says_is_free_is_asked_for_at_once(free: float, name: str) -> None:
    wants = (Want.OTHER_GPU, Want.MEMORY_LOWER)
    assert chosen(after(cause(*wants, free=free, total=100.0))) == name


def test_what_is_free_may_be_too_little() -> None:
    choice = choose(LADDER, [after(cause(Want.MEMORY_LOWER, free=50.0, total=100.0))])
    assert choice.outs == (Out(what="less memory utilisation", why="what is free would need 0.48"),)
    assert choose(LADDER, [after(cause(Want.MEMORY_LOWER, free=0.1, total=100.0))]).outs[0].why.endswith("0.00")


def test_utilisation_is_raised_to_its_ceiling() -> None:
    assert walk(cause(Want.MEMORY_RAISE)) == ["utilisation-0.95"]
    low = replace(LADDER, base=replace(FOUR, utilisation=0.82))
    assert walk(cause(Want.MEMORY_RAISE), low) == ["utilisation-0.87", "utilisation-0.92", "utilisation-0.95"]
    assert walk(cause(Want.MEMORY_RAISE), replace(LADDER, base=replace(FOUR, utilisation=0.97))) == []


def test_between_too_much_and_too_little_no_value_is_tried_twice_and_graphs_go_next() -> None:
    too_little, too_much = cause(Want.MEMORY_RAISE, name="kv"), cause(Want.MEMORY_LOWER, Want.EAGER, name="oom")
    failures = [after(too_little), after(too_much, "utilisation-0.95")]
    assert chosen(*failures) == "eager", "0.90 was too little"
    failures = [after(too_much), after(too_little, "utilisation-0.85")]
    choice = choose(LADDER, failures)
    assert choice.remedy is None
    assert choice.outs == (Out(what="more memory utilisation", why="0.9 was too much"),)


def test_other_numbers_of_gpus_say_nothing_about_how_much_memory_these_need() -> None:
    failures = [after(cause(Want.MEMORY_RAISE, name="kv"), "tp-2"), after(cause(Want.MEMORY_LOWER), "utilisation-0.95")]
    assert chosen(*failures) == "utilisation-0.90"


@pytest.mark.parametrize("want", [Want.MEMORY_LOWER, Want.MEMORY_RAISE])
def test_without_gpus_there_is_no_memory_to_change(want: Want) -> None:
    (out,) = choose(ON_CPU, [after(cause(want), ladder=ON_CPU)]).outs
    assert out.why == "without GPUs there is none"


# -- what clients see --------------------------------------------------------------------------------------------------

RELEASED = replace(LADDER, areas=frozenset(Area), context=8192)


@pytest.mark.parametrize(("want", "what"), [(Want.CONTEXT_LENGTH, "a shorter context"), (Want.DTYPE, "float16")])
def test_what_clients_see_is_changed_only_where_it_is_released(want: Want, what: str) -> None:
    assert choose(LADDER, [after(cause(want))]).outs == (
        Out(what=what, why=f'clients would see it, and ladder.may_change does not name "{want}"', forbidden=True),
    )
    assert choose(RELEASED, [after(cause(want))]).remedy is not None


def test_what_is_pinned_is_not_changed_and_the_next_want_is_asked() -> None:
    pinned = replace(LADDER, areas=BY_DEFAULT - {Area.TRANSPORTS})
    choice = choose(pinned, [after(cause(*DEFAULT_ORDER))])
    assert choice.outs == (Out(what="peer-to-peer off", why='ladder.pin names "transports"', forbidden=True),)
    assert choice.remedy == remedies.utilisation(0.85, raises=False)


def test_the_context_becomes_as_long_as_the_engine_says_fits_else_half_as_long() -> None:
    assert chosen(after(cause(Want.CONTEXT_LENGTH, fits=6800.0)), ladder=RELEASED) == "context-6656"
    assert walk(cause(Want.CONTEXT_LENGTH), RELEASED) == [
        "context-4096", "context-2048", "context-1024", "context-512", "context-256"
    ]  # fmt: skip
    blind = replace(RELEASED, context=None)
    assert chosen(after(cause(Want.CONTEXT_LENGTH, fits=6800.0)), ladder=blind) == "context-6656"
    assert choose(blind, [after(cause(Want.CONTEXT_LENGTH))]).outs[0].why == "nobody knows how long it is"


@pytest.mark.parametrize("fits", [255.0, 8192.0, 9000.0])
def test_a_context_that_is_no_shorter_or_next_to_nothing_is_not_tried(fits: float) -> None:
    assert choose(RELEASED, [after(cause(Want.CONTEXT_LENGTH, fits=fits))]).outs[0].why == "no shorter one would help"


def test_float16_and_eager_are_tried_once() -> None:
    assert walk(cause(Want.DTYPE), RELEASED) == ["float16"]
    assert walk(cause(Want.EAGER)) == ["eager"]


# -- GPUs --------------------------------------------------------------------------------------------------------------


def test_fewer_gpus_are_the_first_of_them() -> None:
    assert walk(cause(Want.FEWER_GPUS)) == ["tp-2", "tp-1"]
    assert choose(ONE, [after(cause(Want.FEWER_GPUS), ladder=ONE)]).outs[0].why == "there is one GPU"
    last = [after(cause(Want.FEWER_GPUS), "tp-1")]
    assert choose(LADDER, last).outs[0].why == "there are none fewer"


def test_a_gpu_that_failed_is_replaced_by_a_spare() -> None:
    spared = replace(LADDER, spares=("6", "7"))
    bad = cause(Want.OTHER_GPU, Want.FEWER_GPUS, rank=1)
    assert chosen(after(bad, ladder=spared), ladder=spared) == "gpus-0,2,3,6"
    again = [after(bad, ladder=spared), after(replace(bad, rank=3), "gpus-0,2,3,6", ladder=spared)]
    assert chosen(*again, ladder=spared) == "gpus-0,2,3,7"


def test_a_gpu_that_a_spare_stands_in_for_does_not_come_back_and_the_base_is_no_other_gpu() -> None:
    spared = replace(LADDER, spares=("4", "5"))
    bad = cause(Want.OTHER_GPU, Want.FEWER_GPUS)
    assert chosen(after(bad, "gpus-1,2,3,4", ladder=spared), ladder=spared) == "gpus-1,2,3,5"
    one = replace(LADDER, spares=("4",))
    assert chosen(after(bad, "gpus-1,2,3,4", ladder=one), ladder=one) == "gpus-1,2"


def test_gpus_that_must_not_be_used_leave_the_set_whichever_way_they_failed() -> None:
    out = replace(cause(Want.FEWER_GPUS), gpus=("1", "2"))
    assert chosen(after(out)) == "gpus-0,3"
    assert chosen(after(replace(out, gpus=("0", "2", "3")))) == "gpus-1"
    earlier = [after(replace(out, gpus=("0",))), after(cause(Want.FEWER_GPUS), "gpus-1,2")]
    assert chosen(*earlier) == "gpus-1"
    spared = replace(LADDER, spares=("6",))
    assert chosen(after(replace(cause(Want.OTHER_GPU), gpus=("3",)), ladder=spared), ladder=spared) == "gpus-0,1,2,6"
    assert choose(LADDER, [after(replace(out, gpus=("0", "1", "2", "3")))]).outs[0].why == "the others have failed too"
    most = after(replace(out, gpus=("0", "1", "2")), ladder=spared)
    assert chosen(most, ladder=spared) == "gpus-3,6", "a spare helps also where fewer will do"


def test_with_a_pipeline_as_many_gpus_are_kept_as_it_needs() -> None:
    deep = replace(LADDER, base=replace(FOUR, tensor_parallel=2), pipeline_parallel=2, sizes=(), spares=("4",))
    remedy = choose(deep, [after(cause(Want.OTHER_GPU, rank=0), ladder=deep)]).remedy
    assert remedy is not None
    assert (remedy.gpus, remedy.tensor_parallel) == (("1", "2", "3", "4"), 2)
    assert deep.rung(remedy.name).remedies == (remedy,)


def test_what_is_not_free_is_not_asked_for_again_for_the_cache() -> None:
    not_free = cause(Want.OTHER_GPU, Want.MEMORY_LOWER, name="not-free", free=88.0, total=100.0)
    failures = [after(not_free), after(cause(Want.MEMORY_RAISE, name="kv"), "utilisation-0.85")]
    assert choose(LADDER, failures).outs[-1].why == "0.9 was too much"


def test_without_a_spare_the_others_go_on_alone() -> None:
    bad = cause(Want.OTHER_GPU, Want.FEWER_GPUS, rank=1)
    choice = choose(LADDER, [after(bad)])
    assert choice.outs == (Out(what="another GPU", why="gpus.spares names none that is left"),)
    assert choice.remedy is not None
    assert choice.remedy.gpus == ("0", "2")
    assert choice.remedy.name == "gpus-0,2"


def test_where_nobody_knows_which_gpu_is_bad_others_are_tried_in_turn_until_the_culprit_is_found() -> None:
    two = Ladder(base=replace(FOUR, gpus=("0", "1"), tensor_parallel=2), sizes=(1,))
    assert walk(cause(Want.OTHER_GPU, Want.FEWER_GPUS), two) == ["tp-1", "gpus-1"]
    assert walk(cause(Want.OTHER_GPU, Want.FEWER_GPUS))[:2] == ["tp-2", "gpus-2,3"]


def test_a_rank_beyond_the_gpus_is_nobody() -> None:
    assert chosen(after(cause(Want.FEWER_GPUS, Want.OTHER_GPU, rank=9))) == "tp-2"


def test_without_gpus_fewer_ranks_are_all_there_is() -> None:
    assert walk(cause(Want.OTHER_GPU, Want.FEWER_GPUS), ON_CPU) == ["tp-1"]


def test_where_all_others_have_failed_too_there_are_no_fewer() -> None:
    bad = cause(Want.OTHER_GPU, Want.FEWER_GPUS)
    tried = [after(bad, f"gpus-{gpu}") if gpu else after(bad, "tp-1") for gpu in (0, 1, 2)]
    failures = [*tried, after(bad, "gpus-1"), after(bad, "gpus-2"), after(bad, "gpus-3"), after(bad, "tp-2")]
    assert choose(LADDER, failures).outs[-1] == Out(what="fewer GPUs", why="the others have failed too")


# -- the admin's own ---------------------------------------------------------------------------------------------------

OWN = replace(LADDER, own=(Remedy(name="mine"), Remedy(name="other")))


def test_the_admins_own_rungs_may_cure_anything_in_the_order_written() -> None:
    assert walk(cause(Want.MEMORY_LOWER), OWN) == ["mine", "mine+other"]
    assert walk(cause(Want.PLAIN_RETRY, Want.NVLS), OWN) == ["again", "mine", "mine+other"]


def test_they_do_not_help_where_nothing_helps_and_an_empty_list_changes_nothing() -> None:
    assert walk(cause(Want.STOP), OWN) == []
    assert walk(cause(*DEFAULT_ORDER), replace(LADDER, own=())) == []


def test_what_is_wanted_can_be_asked_for_by_itself() -> None:
    assert find(Want.EAGER, LADDER, [after(cause(*DEFAULT_ORDER))]) == remedies.EAGER
    assert Rung(remedies=(remedies.EAGER,)).name == "eager"
