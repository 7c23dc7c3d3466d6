"""A check ends no load for what would not help it, and none of what it may hear makes the daemon fall over."""

from __future__ import annotations

from typing import Final

import pytest

from mgpu_llm.core import recording, report, transports
from mgpu_llm.core.effects import BeginPreflight, ExtendTimeout
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport, When
from mgpu_llm.core.recording import RecordingError
from mgpu_llm.core.remedies import P2P_OFF, Remedy
from mgpu_llm.core.states import Starting
from mgpu_llm.core.transports import MOST_ASKED
from mgpu_llm.ctl.load import steps
from tests.core.everything import IDENTITY
from tests.core.test_stories_of_preflight import CURED, HUNG, PASSED, started, with_ladder, world
from tests.core.world import World

LOW: Final = Remedy(name="low", utilisation=0.5)
QUIET: Final = Remedy(name="quiet", env={"NCCL_P2P_DISABLE": "1"})
ONE: Final = Remedy(name="one", tensor_parallel=1)
BROKEN_SECOND: Final = Checked(gpus={"GPU-b": "CUDA error: uncorrectable ECC error"})
WRONG_COPIES: Final = Checked(transports=PASSED.transports, pairs={("GPU-a", "GPU-b"): "7 of 1024 words are others"})
HUNG_AND_QUIET: Final = Checked(transports=(HUNG, Transport(name="quiet", works=True)))


def own(*rungs: Remedy) -> World:
    """A world with rungs of the admin's own, whose engine loads."""
    return started(with_ladder(own=rungs)).spawn()


def asked(*rungs: Remedy) -> list[str]:
    (check,) = own(*rungs).all(BeginPreflight)
    return list(check.transports)


def test_systemd_is_asked_for_as_much_time_as_a_check_before_the_load_may_take() -> None:
    begun = world(When.BEFORE, preflight_s=600.0)
    assert max(effect.seconds for effect in begun.all(ExtendTimeout)) > 600


def test_a_rung_with_the_name_of_the_launchs_own_transport_does_not_stand_in_for_it() -> None:
    begun = own(Remedy(name=AS_LAUNCHED, env=QUIET.env))
    assert begun.all(BeginPreflight)[0].transports == {AS_LAUNCHED: {}}


def test_of_own_rungs_those_are_tried_that_are_about_nccl_and_a_few_only() -> None:
    assert asked(Remedy(name="attention", env={"VLLM_ATTENTION_BACKEND": "FLASHINFER"}), QUIET) == [
        AS_LAUNCHED,
        "quiet",
    ]
    many = (Remedy(name=f"algo-{number}", env={"NCCL_ALGO": str(number)}) for number in range(9))
    assert len(asked(*many)) == 1 + MOST_ASKED


@pytest.mark.parametrize("found", [BROKEN_SECOND, WRONG_COPIES, HUNG_AND_QUIET], ids=["gpu", "copies", "transport"])
def test_a_load_is_not_ended_for_an_own_rung_that_is_about_something_else(found: Checked) -> None:
    begun = own(LOW, QUIET).checked(found)
    assert isinstance(begun.state, Starting)
    assert begun.announced("preflight.failed")[0].facts["consequence"]
    assert begun.state.run.out == {}


def test_an_own_rung_without_the_broken_gpu_is_taken() -> None:
    begun = own(ONE).checked(BROKEN_SECOND).gone()
    assert (begun.rung, begun.policy.launch(begun.state.run.rung).gpus) == ("one", ("GPU-a",))
    first = own(ONE).checked(Checked(gpus={"GPU-a": "CUDA error: uncorrectable ECC error"}))
    assert isinstance(first.state, Starting), "that rung has just the broken one"


def test_an_own_rung_without_vllms_own_all_reduce_or_with_one_gpu_is_taken_where_copies_arrive_wrong() -> None:
    assert own(Remedy(name="off", env=P2P_OFF.env, args=P2P_OFF.args)).checked(WRONG_COPIES).gone().rung == "off"
    assert own(ONE).checked(WRONG_COPIES).gone().rung == "one"


def test_a_transport_that_fails_without_words_is_told_all_the_same() -> None:
    found = transports.judge(Checked(transports=(Transport(name=AS_LAUNCHED, works=False),)), ("0", "1"))
    assert found is not None
    assert found.summary.endswith("as NCCL would have it: fails")


@pytest.mark.parametrize("said", ["", "one\ntwo", "MIG-1: it\u2028fails"])
def test_whatever_is_said_of_a_gpu_it_is_told(said: str) -> None:
    found = transports.judge(Checked(gpus={"MIG:1": said}), ("MIG:1",))
    assert found is not None
    assert (found.cause, found.gpus) == ("gpu-broken", ("MIG:1",))


@pytest.mark.parametrize("checked", [{"gpus": {" ": "x"}}, {"pairs": [["0", "", "x"]]}])
def test_a_recorded_check_of_a_gpu_without_a_name_is_a_broken_recording(checked: dict[str, object]) -> None:
    row = {"t": 1.0, "kind": "preflight", "checked": checked}
    with pytest.raises(RecordingError, match="a GPU has no name"):
        list(recording.of_row(row, attempt=1, spawned_at=0.0))


def test_who_follows_a_start_behind_a_pipe_sees_which_attempt_is_checked() -> None:
    begun = world(When.BEFORE)
    assert steps(report.status(begun.state, begun.policy, begun.at, IDENTITY)) == "checking, attempt 1 on rung base"
    begun.checked(CURED)
    assert steps(report.status(begun.state, begun.policy, begun.at, IDENTITY)) == "checking, attempt 2 on rung p2p-off"
