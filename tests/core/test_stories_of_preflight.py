"""What becomes of a start whose GPUs are checked before its engine comes to them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final

import pytest

from mgpu_llm.core import recorded_policy, recording, remedies, replay, report
from mgpu_llm.core.effects import (
    Announce,
    BeginPreflight,
    EndPreflight,
    Exit,
    KeepIncident,
    KillEngine,
    Level,
    SpawnEngine,
)
from mgpu_llm.core.events import EngineExited, Preflighted, RestartRequested, StartRequested
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import Nvlink
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport, When
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy
from mgpu_llm.core.states import Backoff, Checking, Failed, Killing, Policy, Run, Starting, Stopped
from tests.core.everything import IDENTITY
from tests.core.world import BANNER, BASE, NCCL, ON_CPU, WORLD_SIZE, World, of, policy

HUNG: Final = Transport(name=AS_LAUNCHED, works=False, took_s=5.0, detail="no answer for 5 s in an all-reduce")
PASSED: Final = Checked(transports=(Transport(name=AS_LAUNCHED, works=True, gib_per_s=255.4, took_s=1.0),), took_s=6.04)
CURED: Final = Checked(
    transports=(HUNG, Transport(name="p2p-off", works=True, gib_per_s=25.6), Transport(name="sockets"))
)
NOTHING_WORKS: Final = Checked(transports=(HUNG, Transport(name="p2p-off", works=False, detail="no answer for 5 s")))


def world(mode: When = When.OVERLAP, launch: Launch = BASE, **changes: object) -> World:
    """A world whose first attempt has just begun."""
    begun = World(policy=policy(launch, preflight=mode, **changes))
    begun.send(StartRequested(at=begun.at))
    return begun


def with_ladder(**changes: object) -> Policy:
    """The policy in overlap, its ladder changed so."""
    usual = policy(BASE, preflight=When.OVERLAP)
    return replace(usual, ladder=replace(usual.ladder, **changes))  # type: ignore[arg-type]


def started(policy: Policy) -> World:
    begun = World(policy=policy)
    begun.send(StartRequested(at=begun.at))
    return begun


def kinds(world: World) -> list[type]:
    return [type(effect) for effect in world.effects if not isinstance(effect, Announce)]


# -- when there is one --------------------------------------------------------------------------------------------------


def test_beside_the_load_the_engine_is_spawned_first_and_the_check_begins_then() -> None:
    begun = world()
    assert isinstance(begun.state, Starting)
    assert kinds(begun)[-2:] == [SpawnEngine, BeginPreflight]
    (check,) = begun.all(BeginPreflight)
    assert (check.attempt, check.gpus, check.launch) == (1, ("GPU-a", "GPU-b"), begun.policy.ladder.base)
    assert report.status(begun.state, begun.policy, begun.at, IDENTITY).preflight == "under way"


def test_before_the_load_the_engine_is_spawned_once_the_check_has_passed() -> None:
    begun = world(When.BEFORE)
    assert isinstance(begun.state, Checking)
    assert not begun.alive
    told = report.status(begun.state, begun.policy, begun.at + 3, IDENTITY)
    assert (told.state, told.phase, told.preflight) == ("checking", "preflight", "under way")
    assert told.headline == "checking the GPUs before the load, 3 s, attempt 1 on rung base"
    assert told.attempts[-1].outcome == "running"
    begun.checked(PASSED).spawn()
    assert isinstance(begun.state, Starting)
    assert begun.spawned == [1]
    assert begun.state.since == begun.at
    told = report.status(begun.state, begun.policy, begun.at, IDENTITY)
    assert told.preflight == "passed in 6.0 s: works, 255 GiB/s in all-reduce"


@pytest.mark.parametrize("mode", [When.BEFORE, When.OVERLAP])
def test_without_gpus_nothing_is_checked(mode: When) -> None:
    begun = world(mode, ON_CPU)
    assert begun.all(BeginPreflight) == []
    assert begun.spawned == [1]


def test_nothing_is_checked_where_that_is_off() -> None:
    assert world(When.OFF).all(BeginPreflight) == []


def test_one_gpu_is_checked_alone_and_gpus_beyond_the_ranks_are_left_alone() -> None:
    one = world(launch=replace(BASE, gpus=("GPU-a",), tensor_parallel=1)).all(BeginPreflight)[0]
    assert (one.gpus, one.transports) == (("GPU-a",), {})
    two = world(launch=replace(BASE, gpus=("0", "1", "2"))).all(BeginPreflight)[0]
    assert two.gpus == ("0", "1")


# -- by which transports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nvlink", "others"),
    [
        (Nvlink.NONE, ["p2p-off", "sockets"]),
        (Nvlink.SOME, ["p2p-nvlink-only", "p2p-off", "sockets"]),
        (Nvlink.ALL, ["nvlink-gentle", "p2p-off", "sockets"]),
    ],
)
def test_the_launchs_own_transport_comes_first_and_then_those_of_the_ladder_from_gentle_to_certain(
    nvlink: Nvlink, others: list[str]
) -> None:
    (check,) = started(with_ladder(nvlink=nvlink)).all(BeginPreflight)
    assert list(check.transports) == [AS_LAUNCHED, *others]
    assert check.transports[AS_LAUNCHED] == {}
    assert check.transports["p2p-off"] == {"NCCL_P2P_DISABLE": "1"}


def test_what_is_so_already_and_what_may_not_be_changed_is_not_asked_about() -> None:
    off = with_ladder(base=remedies.P2P_OFF.over(BASE))
    assert list(started(off).all(BeginPreflight)[0].transports) == [AS_LAUNCHED, "sockets"]
    pinned = with_ladder(areas=BY_DEFAULT - {Area.TRANSPORTS})
    assert list(started(pinned).all(BeginPreflight)[0].transports) == [AS_LAUNCHED]


def test_of_rungs_of_the_admins_own_those_are_asked_about_that_set_variables() -> None:
    own = (Remedy(name="quiet", env={"NCCL_P2P_DISABLE": "1"}), Remedy(name="low", utilisation=0.5))
    begun = started(with_ladder(own=own))
    assert list(begun.all(BeginPreflight)[0].transports) == [AS_LAUNCHED, "quiet"]
    seen = Checked(transports=(HUNG, Transport(name="quiet", works=True)))
    assert begun.spawn().checked(seen).gone().rung == "quiet"


# -- what follows -------------------------------------------------------------------------------------------------------


def test_a_transport_that_hangs_sends_the_engine_to_one_that_works_before_it_comes_to_nccl() -> None:
    begun = world().spawn().say(BANNER).checked(CURED)
    assert isinstance(begun.state, Killing)
    assert kinds(begun)[-2:] == [KeepIncident, KillEngine]
    found = begun.last_diagnosis
    assert (found.cause, found.outcome) == ("transport-broken", "averted")
    assert found.summary == (
        "GPUs GPU-a, GPU-b do not reach each other as NCCL would have it: "
        "no answer for 5 s in an all-reduce; p2p-off works"
    )
    assert found.evidence == (
        "as-launched: no answer for 5 s in an all-reduce",
        "p2p-off: works, 25.6 GiB/s in all-reduce",
        "sockets: not found out",
    )
    assert begun.announced("preflight.failed") == [], "it is told once"
    assert begun.announced("engine.averted")[0].facts["next"] == "step to rung p2p-off"
    assert begun.gone().rung == "p2p-off"
    assert begun.spawned == [1, 2]


def test_before_the_load_no_engine_is_spawned_on_what_hangs() -> None:
    begun = world(When.BEFORE).checked(CURED)
    assert (begun.rung, begun.spawned, type(begun.state)) == ("p2p-off", [], Checking)
    assert begun.announced("preflight.failed")[0].facts["next"] == "step to rung p2p-off"
    begun.checked(PASSED).spawn()
    assert (begun.rung, begun.spawned) == ("p2p-off", [2])
    (failed,) = (ended for ended in begun.state.run.ended)
    assert (failed.phase, failed.outcome, failed.incident) == ("preflight", "averted", "")


def test_a_gentler_transport_is_taken_where_it_works_and_passed_over_where_it_hangs() -> None:
    alike = with_ladder(nvlink=Nvlink.ALL)
    for works, rung in ((True, "nvlink-gentle"), (False, "p2p-off"), (None, "p2p-off")):
        gentle = Transport(name="nvlink-gentle", works=works, detail="" if works else "no answer")
        seen = Checked(transports=(HUNG, gentle, Transport(name="p2p-off", works=True)))
        assert started(alike).spawn().checked(seen).gone().rung == rung


def test_sockets_are_taken_only_where_nothing_else_works() -> None:
    last = Checked(transports=(*NOTHING_WORKS.transports, Transport(name="sockets", works=True)))
    assert world().spawn().checked(last).gone().rung == "sockets"


def test_what_was_seen_to_hang_is_not_tried_after_a_later_failure_either() -> None:
    last = Checked(transports=(*NOTHING_WORKS.transports, Transport(name="sockets", works=True)))
    begun = world().spawn().checked(last).gone().checked(PASSED)
    begun.say(WORLD_SIZE, NCCL).look()
    begun.watch(1000)
    assert begun.gone().rung != "sockets+p2p-off"


def test_where_no_transport_works_there_are_fewer_gpus() -> None:
    begun = world().spawn().checked(NOTHING_WORKS)
    assert begun.last_diagnosis.summary.endswith("p2p-off fails too")
    assert begun.gone().rung == "tp-1"


def test_a_gpu_that_fails_alone_leaves_the_set() -> None:
    begun = world().spawn().checked(Checked(gpus={"GPU-a": "CUDA error 999: unknown error"}))
    found = begun.last_diagnosis
    assert (found.cause, found.gpus) == ("gpu-broken", ("GPU-a",))
    assert found.summary == "GPU GPU-a cannot compute: CUDA error 999: unknown error"
    begun.gone()
    assert begun.policy.launch(begun.state.run.rung).gpus == ("GPU-b",)


def test_where_all_gpus_fail_alone_the_load_shows_why() -> None:
    begun = world().spawn().checked(Checked(gpus={"GPU-a": "error 999", "GPU-b": "error 999"}))
    assert isinstance(begun.state, Starting)
    assert begun.announced("preflight.failed")[0].level is Level.WARNING
    facts = begun.announced("preflight.failed")[0].facts
    assert facts["summary"] == "GPUs GPU-a, GPU-b cannot compute: error 999"
    assert facts["consequence"] == "nothing that may be changed is known to help, so the load goes on"
    told = report.status(begun.state, begun.policy, begun.at, IDENTITY)
    assert told.preflight == "GPU GPU-a alone: error 999; GPU GPU-b alone: error 999"


def test_copies_that_arrive_wrong_turn_off_what_vllm_builds_on_them() -> None:
    wrong = replace(PASSED, pairs={("GPU-a", "GPU-b"): "7 of 1024 words are others"})
    begun = world().spawn().checked(wrong)
    assert begun.last_diagnosis.cause == "peer-copies-wrong"
    assert begun.last_diagnosis.summary.endswith("GPU GPU-a to GPU-b: 7 of 1024 words are others")
    assert begun.gone().rung == "custom-all-reduce-off"


def test_pairs_that_do_not_reach_each_other_are_named() -> None:
    begun = world().spawn().checked(replace(CURED, pairs={("GPU-a", "GPU-b"): "no answer for 4 s"}))
    assert begun.last_diagnosis.summary.startswith("GPUs GPU-a and GPU-b do not reach each other")
    assert "GPU GPU-a to GPU GPU-b: no answer for 4 s" in begun.last_diagnosis.evidence


# -- where nothing is known that helps, the load goes on ----------------------------------------------------------------


def test_a_load_is_not_ended_for_a_transport_that_nobody_has_seen_to_work() -> None:
    unsure = Checked(transports=(HUNG, Transport(name="p2p-off")))
    begun = world().spawn().checked(unsure)
    assert isinstance(begun.state, Starting)
    assert begun.announced("preflight.failed")[0].facts["advice"]


def test_a_load_is_not_ended_where_the_transport_must_not_be_changed_and_nothing_else_helps() -> None:
    pinned = with_ladder(areas=frozenset({Area.UTILISATION}))
    begun = started(pinned).spawn().checked(Checked(transports=(HUNG,)))
    assert isinstance(begun.state, Starting)


def test_what_could_not_be_checked_is_told_and_changes_nothing() -> None:
    begun = world().spawn().checked(Checked(unobserved="the engine's Python has no torch"))
    assert isinstance(begun.state, Starting)
    assert begun.announced("preflight.unobserved")[0].facts["why"] == "the engine's Python has no torch"
    told = report.status(begun.state, begun.policy, begun.at, IDENTITY)
    assert told.preflight == "not known: the engine's Python has no torch"


def test_what_passed_in_an_earlier_start_says_so() -> None:
    begun = world().spawn().checked(replace(PASSED, remembered=True))
    assert begun.announced("preflight.passed")[0].facts["found"].startswith("passed in an earlier start: works")  # type: ignore[attr-defined]
    one = world().spawn().checked(Checked(took_s=2.0))
    assert one.announced("preflight.passed")[0].facts["found"] == "passed in 2.0 s: works"


# -- the engine is faster, or is ended ----------------------------------------------------------------------------------


def test_a_check_that_is_not_done_when_the_engine_comes_to_its_gpus_is_ended() -> None:
    begun = world().spawn().say(BANNER)
    assert begun.all(EndPreflight) == []
    begun.say(WORLD_SIZE)
    assert begun.all(EndPreflight) == [EndPreflight(attempt=1)]
    assert begun.announced("preflight.unfinished")
    before = begun.state
    begun.checked(CURED)
    assert begun.state == before, "an answer on its way came too late"
    begun.say(NCCL)
    assert len(begun.all(EndPreflight)) == 1


def test_an_engine_that_is_killed_takes_its_check_with_it_and_the_next_has_its_own() -> None:
    begun = world().spawn().say("RuntimeError: CUDA error: out of order").exits(1)
    assert isinstance(begun.state, Killing)
    late = begun.send(Preflighted(at=begun.at, attempt=1, checked=CURED))
    assert late == ()
    begun.gone()
    if isinstance(begun.state, Backoff):
        begun.wait_out_backoff()
    assert len(begun.all(BeginPreflight)) == 2


def test_what_passed_before_is_tried_again_once_a_load_has_failed_of_it() -> None:
    begun = world().spawn().checked(PASSED).say(WORLD_SIZE, NCCL).look()
    begun.watch(1000)
    assert begun.last_diagnosis.outcome == "stalled"
    begun.gone()
    assert [check.anew for check in begun.all(BeginPreflight)] == [False, True]
    averted = world().spawn().checked(CURED).gone()
    assert [check.anew for check in averted.all(BeginPreflight)] == [False, False], "it has passed just now"


def test_a_stop_during_the_check_ends_it_and_nothing_else() -> None:
    begun = world(When.BEFORE)
    begun.stop()
    assert isinstance(begun.state, Stopped)
    assert kinds(begun)[-1] is EndPreflight
    assert begun.state.run.ended[-1].outcome == "stopped"
    final = world(When.BEFORE)
    final.stop(final=True)
    assert final.exit == Exit(status=0)
    assert of(tuple(final.effects), EndPreflight)


def test_a_restart_during_the_check_begins_another() -> None:
    begun = world(When.BEFORE)
    begun.send(RestartRequested(at=begun.at, by="the test"))
    assert isinstance(begun.state, Checking)
    assert [type(effect) for effect in begun.effects if isinstance(effect, BeginPreflight | EndPreflight)] == [
        BeginPreflight,
        EndPreflight,
        BeginPreflight,
    ]
    assert begun.attempt == 2
    assert begun.tick() == ()


def test_where_the_check_before_the_load_finds_nothing_left_to_try_the_daemon_gives_up_only_after_the_attempts() -> (
    None
):
    begun = world(When.BEFORE, attempts=1)
    begun.checked(CURED)
    assert isinstance(begun.state, Failed)
    assert begun.exit is not None
    assert begun.exit.status == 69


def test_a_rung_that_is_only_tried_goes_back_to_what_served_before() -> None:
    known = KnownGood(rung="p2p-off", since="2026-11-24T21:05:00Z", cause="transport-broken", starts=9)
    begun = World(policy=policy(BASE, preflight=When.OVERLAP), state=Stopped(run=Run(known=known)))
    begun.send(StartRequested(at=begun.at))
    assert begun.rung == "base"
    assert begun.spawn().checked(Checked(transports=(HUNG, Transport(name="p2p-off")))).gone().rung == "p2p-off"


# -- recorded -----------------------------------------------------------------------------------------------------------


def test_a_recorded_check_is_judged_again_as_it_was() -> None:
    begun = world().spawn()
    header = recorded_policy.header(begun.policy, begun.state.run)
    row = recording.to_row(Preflighted(at=begun.at + 4, attempt=1, checked=CURED), begun.at)
    lines = [json.dumps(header), json.dumps(row), json.dumps(recording.note(4.0, "stopping"))]
    judged = replay.judge(recording.read(lines))
    assert (judged.outcome, judged.cause, judged.decision) == ("averted", "transport-broken", "step to rung p2p-off")


def test_an_earlier_attempts_findings_are_in_the_next_ones_recording() -> None:
    begun = world().spawn().checked(CURED).gone()
    again = recorded_policy.run_of(
        recording.cut(iter([recorded_policy.header(begun.policy, begun.state.run)])), begun.policy
    )
    found = again.ended[-1].diagnosis
    assert found is not None
    assert dict(found.transports) == {"p2p-off": True}


def test_an_exit_while_the_check_goes_on_is_diagnosed_as_ever() -> None:
    begun = world().spawn()
    begun.send(EngineExited(at=begun.at, attempt=1, status=1))
    assert begun.last_diagnosis.cause == "engine-exited"
