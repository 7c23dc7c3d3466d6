"""The preflight with real processes over a stand-in for PyTorch: what is found out of GPUs and transports."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from mgpu_llm.adapters.memory.preflight import PassedPreflights
from mgpu_llm.adapters.preflight import Patience, Preflight
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport

SUPPORT: Final = Path(__file__).resolve().parents[1] / "support"
FAKE_TORCH: Final = SUPPORT / "fake_torch"
TRANSPORTS: Final[Mapping[str, Mapping[str, str]]] = {
    AS_LAUNCHED: {},
    "p2p-off": {"NCCL_P2P_DISABLE": "1"},
    "p2p-and-shm-off": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
#: For those that really hang.
QUICK: Final = Patience(
    others_s=0.2,
    floor_s=1.0,
    other_floor_s=0.8,
    more_s=0.0,
    grace_s=0.5,
    hopeless_s=1.5,
    settled_s=0.3,
    measured_s=2.0,
    pairs_s=10.0,
)
#: For the others: as it is, but for what is only waited.
USUAL: Final = Patience(settled_s=0.3)
Fault = dict[str, Any]
HANGS: Final[Fault] = {"at": "all_reduce", "do": "hang", "gpu": 1}
NO_P2P: Final = {"NCCL_P2P_DISABLE": "1"}
NO_SHM: Final = {"NCCL_SHM_DISABLE": "1"}


def environment(*faults: Fault, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(FAKE_TORCH), "FAKE_TORCH": json.dumps(faults), **more}


def preflight(
    *,
    patience: Patience | None = None,
    memory: PassedPreflights | None = None,
    key: Mapping[str, str] | None = None,
    deadline_s: float = 60.0,
    python: tuple[str, ...] = (sys.executable,),
) -> Preflight:
    return Preflight(
        python=python,
        memory=memory,
        key=key or {},
        deadline_s=deadline_s,
        clock=time.monotonic,
        patience=patience or USUAL,
    )


def gpus(count: int) -> dict[str, str]:
    return {str(number): f"GPU-{number}" for number in range(count)}


def check(
    *faults: Fault,
    count: int = 2,
    patience: Patience | None = None,
    deadline_s: float = 60.0,
    more: Mapping[str, str] | None = None,
) -> Checked:
    checking = preflight(patience=patience, deadline_s=deadline_s)
    return asyncio.run(checking.check(gpus(count), environment(*faults, **(more or {})), TRANSPORTS))


def works(checked: Checked) -> dict[str, bool | None]:
    return {transport.name: transport.works for transport in checked.transports}


def transport(checked: Checked, name: str) -> Transport:
    return next(each for each in checked.transports if each.name == name)


def test_healthy_gpus_pass_as_launched_and_nothing_else_is_tried() -> None:
    checked = check()
    (own,) = checked.transports
    assert (own.name, own.works, own.detail) == (AS_LAUNCHED, True, "")
    assert own.gib_per_s is not None
    assert own.gib_per_s > 0
    assert (checked.gpus, checked.pairs, checked.unobserved, checked.remembered) == ({}, {}, "", False)
    assert checked.took_s > 0


def test_one_healthy_gpu_is_tried_alone() -> None:
    checked = check(count=1)
    assert (checked.transports, checked.gpus, checked.unobserved) == ((), {}, "")


def test_a_hang_that_is_cured_by_p2p_off_is_told_with_that_cure() -> None:
    checked = check({**HANGS, "unless": NO_P2P}, patience=QUICK)
    assert works(checked)[AS_LAUNCHED] is False
    assert works(checked)["p2p-off"] is True
    own = transport(checked, AS_LAUNCHED)
    assert own.detail.startswith("an all-reduce had not come back after ")
    assert "; p2p-off passed within " in own.detail
    assert transport(checked, "p2p-off").gib_per_s is not None
    assert (checked.gpus, checked.unobserved) == ({}, "")


def test_a_gentle_alternative_that_hangs_too_is_told_as_such() -> None:
    checked = check({**HANGS, "unless": NO_SHM}, patience=QUICK)
    assert works(checked) == {AS_LAUNCHED: False, "p2p-off": False, "p2p-and-shm-off": True}


def test_where_every_transport_hangs_for_long_none_works() -> None:
    checked = check(HANGS, patience=QUICK)
    assert works(checked) == {AS_LAUNCHED: False, "p2p-off": False, "p2p-and-shm-off": False}
    assert transport(checked, AS_LAUNCHED).detail.endswith("; and no other came back either")


def test_where_every_transport_fails_in_its_own_way_each_is_told_with_its_error() -> None:
    text = "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error\nncclSystemError: System call failed.\nLast error:\nno"
    fails: Fault = {"at": "all_reduce", "do": "raise", "kind": "DistBackendError"}
    checked = check({**fails, "text": text, "unless": NO_P2P}, {**fails, "text": "NCCL: no host memory"})
    assert works(checked) == {AS_LAUNCHED: False, "p2p-off": False, "p2p-and-shm-off": False}
    assert [each.detail for each in checked.transports] == [
        "rank 0: ncclSystemError: no",
        *["rank 0: NCCL: no host memory"] * 2,
    ]


def test_a_sum_that_is_wrong_by_every_transport_is_told_as_such() -> None:
    checked = check({"at": "all_reduce", "do": "wrong"})
    assert works(checked) == {AS_LAUNCHED: False, "p2p-off": False, "p2p-and-shm-off": False}


def test_a_wrong_sum_counts_as_broken() -> None:
    checked = check({"at": "all_reduce", "do": "wrong", "gpu": 0, "unless": NO_P2P})
    assert works(checked)[AS_LAUNCHED] is False
    assert works(checked)["p2p-off"] is True
    assert transport(checked, AS_LAUNCHED).detail == "rank 0: an all-reduce of 256 numbers gives 4.0 to 4.0, not 3.0"


def test_a_rank_that_crashes_in_nccl_counts_as_broken() -> None:
    checked = check({"at": "all_reduce", "do": "die", "number": 11, "gpu": 1, "unless": NO_P2P})
    assert works(checked)[AS_LAUNCHED] is False
    assert works(checked)["p2p-off"] is True
    assert transport(checked, AS_LAUNCHED).detail == "rank 1: ended by SIGSEGV"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"at": "matmul", "do": "wrong"}, "it computes 385.0 instead of 384.0"),
        (
            {"at": "context", "do": "raise", "kind": "RuntimeError", "text": "CUDA error: uncorrectable ECC error"},
            "CUDA error: uncorrectable ECC error",
        ),
    ],
    ids=["wrong", "error"],
)
def test_a_gpu_that_fails_alone_is_named(fault: Fault, why: str) -> None:
    checked = check({**fault, "gpu": 1})
    assert checked.gpus == {"1": why}
    assert (checked.transports, checked.unobserved) == ((), "")


def test_copies_that_arrive_wrong_name_their_pair_and_direction() -> None:
    checked = check({"at": "copy", "do": "wrong", "gpu": 0, "to": 1})
    assert works(checked) == {AS_LAUNCHED: True}
    assert checked.pairs == {("0", "1"): "a copy, which the driver calls direct, does not arrive as it was sent"}


def test_direct_copies_are_not_asked_for_where_p2p_is_off_by_the_launch() -> None:
    checked = check({"at": "copy", "do": "wrong"}, more=NO_P2P)
    assert (works(checked), checked.pairs) == ({AS_LAUNCHED: True}, {})


def test_of_three_gpus_those_two_are_named_that_do_not_get_through_to_each_other() -> None:
    bad: Fault = {
        "at": "all_reduce",
        "do": "raise",
        "kind": "DistBackendError",
        "text": "NCCL: no path",
        "unless": NO_P2P,
    }
    checked = check({**bad, "gpu": 2}, count=3, patience=QUICK)
    assert works(checked)[AS_LAUNCHED] is False
    assert checked.pairs == {("0", "2"): "rank 1: NCCL: no path", ("1", "2"): "rank 1: NCCL: no path"}


@pytest.mark.parametrize("more", [{}, NO_P2P], ids=["direct", "p2p-off"])
def test_pairs_are_not_tried_over_nccl_where_all_get_through(more: Mapping[str, str]) -> None:
    text = "NCCL: no path"
    checked = check(
        {"at": "all_reduce", "do": "raise", "kind": "DistBackendError", "text": text, "ranks": 2}, count=3, more=more
    )
    assert (works(checked), checked.pairs) == ({AS_LAUNCHED: True}, {})


def test_the_fault_for_real_gpus_hangs_the_probe_too_until_p2p_is_off(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(seen)!r}, 'w').close()")
    places = os.pathsep.join(map(str, (SUPPORT / "fault_plugin_cuda", tmp_path, FAKE_TORCH)))
    checked = check(patience=QUICK, more={"MGPU_FAULT": "p2p-hang", "PYTHONPATH": places})
    assert works(checked)[AS_LAUNCHED] is False
    assert works(checked)["p2p-off"] is True
    assert seen.exists()
