from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.planning import causes, plans, walk
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy, Want
from mgpu_llm.core.states import Run
from tests.core.test_cures import ON_CPU
from tests.core.world import P2P_OFF, policy

POLICY = policy()


def names(*args: str, made_so: object = POLICY) -> list[list[tuple[str, int]]]:
    return [[(planned.rung.name, planned.tries) for planned in plan.rungs] for plan in plans(made_so, *args)]  # type: ignore[arg-type]


def test_without_a_cause_it_is_the_default_order_to_its_end() -> None:
    (plan,) = plans(POLICY)
    assert [planned.rung.name for planned in plan.rungs] == [
        "base", "p2p-off", "p2p-off+utilisation-0.85", "p2p-off+utilisation-0.80", "p2p-off+utilisation-0.80+tp-1"
    ]  # fmt: skip
    assert (plan.cause, plan.status, plan.outs) == ("unknown", 69, ())


def test_a_cause_goes_its_own_way_once_for_each_way_in_which_it_shows() -> None:
    told, unseen, by_the_kernel = names("nccl-p2p")
    assert told == unseen == by_the_kernel == [("base", 1), ("p2p-off", 1), ("p2p-off+tp-1", 1)]
    assert names("worker-killed") == [[("base", 2), ("tp-1", 1)]]
    (one,) = plans(POLICY, "nccl-p2p-unseen")
    assert one.cause == "nccl-p2p"


def test_what_nobody_could_explain_is_tried_as_often_as_the_config_says_and_then_in_the_default_order() -> None:
    assert names("engine-exited")[0][:2] == [("base", 2), ("p2p-off", 1)]
    assert names("engine-exited", made_so=replace(POLICY, crashes_per_rung=1))[0][0] == ("base", 1)
    assert names("died-while-serving") == names()


def test_a_cause_that_nothing_helps_against_ends_after_one_attempt() -> None:
    (plan,) = [plan for plan in plans(POLICY, "driver") if plan.wants == (Want.STOP,)][:1]
    assert [planned.rung for planned in plan.rungs] == [BASE]
    assert plan.status == 65


def test_what_is_wanted_and_cannot_be_had_is_in_it_with_its_reason() -> None:
    outs = plans(POLICY, "no-kv-memory")[0].outs
    assert [(out.what, out.forbidden) for out in outs] == [("a shorter context", True)]
    pinned = replace(POLICY, ladder=replace(POLICY.ladder, areas=BY_DEFAULT - {Area.TRANSPORTS}))
    assert [out.why for out in plans(pinned)[0].outs] == ['ladder.pin names "transports"']
    on_cpu = replace(POLICY, ladder=ON_CPU)
    assert [out.why for out in plans(on_cpu)[0].outs] == ["without GPUs there is none"]


def test_the_admins_own_rungs_are_planned_as_they_are_written() -> None:
    own = replace(POLICY, ladder=replace(POLICY.ladder, own=(Remedy(name="mine"),)))
    (plan,) = plans(own)
    assert ([planned.rung.name for planned in plan.rungs], plan.outs) == (["base", "mine"], ())


def test_the_ceilings_hold_in_a_plan_too() -> None:
    assert len(plans(replace(POLICY, attempts=2))[0].rungs) == 2
    assert len(plans(replace(POLICY, tries_per_cause=3))[0].rungs) == 3


def test_an_unknown_cause_is_refused_and_the_known_ones_can_be_listed() -> None:
    with pytest.raises(ValueError, match='there is no cause "nonsense"'):
        plans(POLICY, "nonsense")
    assert {"nccl-p2p", "cuda-out-of-memory", "bad-arguments"} <= set(causes())
    for cause in causes():
        assert plans(POLICY, cause), cause


def test_what_follows_a_rung_leaves_out_what_the_attempts_no_longer_allow() -> None:
    after = walk(POLICY, Run(attempt=2, tries=2, rung=P2P_OFF), P2P_OFF)
    assert [planned.rung.name for planned in after] == [
        "p2p-off+utilisation-0.85", "p2p-off+utilisation-0.80", "p2p-off+utilisation-0.80+tp-1"
    ]  # fmt: skip
    nearly = replace(POLICY, attempts=3)
    assert [planned.rung.name for planned in walk(nearly, Run(tries=2, struggle=2, rung=P2P_OFF), P2P_OFF)] == [
        "p2p-off+utilisation-0.85"
    ]
    one = policy(Launch(gpus=("0",), tensor_parallel=1, utilisation=0.8))
    assert walk(one, Run(), BASE) == ()


def test_a_plan_is_led_around_gpus_that_are_out_as_every_start_would_be() -> None:
    spared = replace(POLICY, ladder=replace(POLICY.ladder, spares=("GPU-c",)))
    (plan,) = plans(spared, "nccl-p2p-unseen", {"GPU-b": "it is lost"})
    assert [planned.rung.name for planned in plan.rungs][:2] == ["gpus-GPU-a,GPU-c", "gpus-GPU-a,GPU-c+p2p-off"]
    (plan,) = plans(POLICY, out={"GPU-b": "it is lost"})
    assert all(POLICY.launch(planned.rung).gpus == ("GPU-a",) for planned in plan.rungs)
    assert (plan.rungs[0].rung.name, plan.status) == ("tp-1", 69)
    assert plans(POLICY, out={"GPU-z": "it is lost"}) == plans(POLICY)


def test_where_the_gpus_that_are_left_do_not_suffice_a_plan_has_no_rungs() -> None:
    pinned = replace(POLICY, ladder=replace(POLICY.ladder, areas=BY_DEFAULT - {Area.GPUS}))
    for cause in ("unknown", "engine-exited", "nccl-p2p"):
        for plan in plans(pinned, cause, {"GPU-b": "it is lost"}):
            assert (plan.rungs, plan.status) == ((), 69)
    assert walk(pinned, Run(out={"GPU-b": "it is lost"}), BASE) == ()


def test_what_follows_a_rung_whose_gpu_is_out_by_now_begins_without_that_gpu() -> None:
    first, *_ = walk(POLICY, Run(attempt=1, tries=1, rung=BASE, out={"GPU-b": "it is lost"}), BASE)
    assert first.rung.name == "tp-1"
