"""What people are told: the status of every state, its one line, the ladder, and the same again over the socket."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu_llm import control_api
from mgpu_llm.core import report
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.progress import begin
from mgpu_llm.core.remedies import BY_DEFAULT, Area
from mgpu_llm.core.report import Identity
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S, FAILED_PATIENCE_S
from mgpu_llm.core.states import (
    Backoff,
    Ended,
    Fail,
    Failed,
    Killing,
    Ready,
    Rest,
    Run,
    Starting,
    State,
    Stopped,
    Terminating,
)
from mgpu_llm.core.status import Count, GpuStatus, Status
from tests.core.world import NOT_FREE, ON_CPU, P2P_OFF, World, gpu, loading, policy, serving

POLICY = policy()
PATIENCE_S = DEFAULT_PATIENCE_S[Phase.WEIGHTS]
IDENTITY = Identity(version="0.1.0", model="/models/m7b", url="http://127.0.0.1:8000")
STALL = Diagnosis(
    cause="stalled-in-distributed-init",
    outcome="stalled",
    summary="stalled in distributed-init: nothing moved for 15 s",
    advice="check one GPU first",
    evidence=("last line: x",),
)
PAST = (
    Ended(
        number=1,
        rung=BASE,
        outcome="stalled",
        phase="distributed-init",
        ended_at=90.0,
        duration_s=80.0,
        diagnosis=STALL,
    ),
    Ended(number=2, rung=P2P_OFF, outcome="stopped", phase="boot", ended_at=95.0, duration_s=4.0, diagnosis=None),
)
RUN = Run(attempt=3, rung=P2P_OFF, tries=2, ended=PAST, lines_dropped=12)
HEART = replace(
    begin(100.0),
    phase=Phase.WEIGHTS,
    phase_began={Phase.BOOT: 100.0, Phase.WEIGHTS: 140.0},
    spoke_known_words=True,
    shards=Count(done=3, total=8),
    quiet_s=4.4,
    gpus=(gpu(), gpu("GPU-b", utilisation_percent=None)),
)
STARTING = Starting(run=RUN, since=100.0, progress=HEART, pid=702)
READY = Ready(run=RUN, since=180.0, spawned_at=100.0, progress=HEART, pid=702)


def told(state: State, at: float = 200.0) -> Status:
    return report.status(state, POLICY, at, IDENTITY)


@pytest.mark.parametrize(
    ("state", "name", "headline"),
    [
        (Stopped(), "stopped", "stopped: no engine runs; mgpuctl start starts it"),
        (STARTING, "starting", "loading: weights 38 %, shards 3/8, 100 s, attempt 3 on rung p2p-off, quiet for 4 s"),
        (
            replace(
                STARTING, progress=replace(HEART, phase=Phase.WARM_UP, graphs=Count(done=9, total=51), quiet_s=1.0)
            ),
            "starting",
            "loading: warm-up, graphs 9/51, 100 s, attempt 3 on rung p2p-off",
        ),
        (
            Starting(run=Run(attempt=1), since=199.0, progress=begin(199.0)),
            "starting",
            "loading: boot, 1 s, attempt 1 on rung base",
        ),
        (replace(READY, run=replace(RUN, rung=BASE)), "ready", "ready: attempt 3 on rung base"),
        (
            Terminating(run=RUN, deadline=220.0, then=Rest(final=True), why="stopped by systemd"),
            "terminating",
            "ending attempt 3 on rung p2p-off: stopped by systemd",
        ),
        (
            Killing(run=RUN, since=190.0, then=Rest(final=True), why=STALL.summary),
            "killing",
            "ending attempt 3 on rung p2p-off: stalled in distributed-init: nothing moved for 15 s",
        ),
        (
            Backoff(run=RUN, rung=P2P_OFF, until=204.0),
            "backoff",
            "waiting 4 s before attempt 4; the last one: stalled in distributed-init: nothing moved for 15 s",
        ),
        (Backoff(run=Run(attempt=1), rung=BASE, until=100.0), "backoff", "waiting 0 s before attempt 2"),
        (Failed(run=RUN, status=69, message="gave up: no rung left"), "failed", "gave up: no rung left"),
    ],
)
def test_each_state_has_a_name_and_a_line_that_says_it_all(state: State, name: str, headline: str) -> None:
    assert told(state).state == name
    assert told(state).headline == headline


def test_degraded_says_which_rung_and_what_it_costs() -> None:
    status = told(READY)
    assert status.degraded
    assert status.headline.startswith("ready, degraded: rung p2p-off (GPUs talk through host memory")
    assert status.headline.endswith(", attempt 3")
    assert status.changes == ("NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce")
    assert status.cost == P2P_OFF.cost
    assert not told(replace(READY, run=replace(RUN, rung=BASE))).degraded
    assert not told(STARTING).degraded


def test_a_load_shows_its_heartbeat() -> None:
    status = told(STARTING)
    assert (status.phase, status.elapsed_s, status.quiet_s, status.patience_s) == ("weights", 100.0, 4.4, PATIENCE_S)
    assert (status.shards, status.graphs) == (Count(done=3, total=8), None)
    assert status.gpus == (
        GpuStatus(uuid="GPU-a", used_bytes=2_000_000_000, utilisation_percent=100),
        GpuStatus(uuid="GPU-b", used_bytes=2_000_000_000, utilisation_percent=None),
    )
    assert (status.pid, status.attempt, status.rung, status.lines_dropped) == (702, 3, "p2p-off", 12)
    assert (status.model, status.url, status.version) == (IDENTITY.model, IDENTITY.url, IDENTITY.version)


def test_unobserved_gpus_are_told_and_lengthen_the_patience_that_is_shown() -> None:
    status = told(replace(STARTING, progress=replace(HEART, gpus=(), gpus_unobserved="no NVML")))
    assert status.gpus_unobserved == "no NVML"
    assert status.patience_s == 3 * PATIENCE_S
    on_cpu = report.status(STARTING, policy(ON_CPU), 200.0, IDENTITY)
    assert on_cpu.patience_s == PATIENCE_S


def test_a_load_that_has_named_its_failure_shows_the_patience_that_is_left_to_it() -> None:
    slow = policy(patience=dict.fromkeys(Phase, 90.0))
    for clue, patience_s in ((Clue(cause="cuda-out-of-memory", line="x"), FAILED_PATIENCE_S), (Clue(error="K"), 90.0)):
        assert report.status(replace(STARTING, clue=clue), slow, 200.0, IDENTITY).patience_s == patience_s


def test_a_serving_engine_is_not_measured_for_quiet() -> None:
    status = told(READY)
    assert (status.phase, status.elapsed_s) == ("serving", 20.0)
    assert (status.quiet_s, status.patience_s, status.retry_in_s) == (None, None, None)


def test_without_an_engine_there_is_nothing_to_show_of_one() -> None:
    for state in (
        Stopped(run=RUN),
        Backoff(run=RUN, rung=P2P_OFF, until=204.0),
        Failed(run=RUN, status=69, message="m"),
    ):
        status = told(state)
        assert (status.pid, status.shards, status.gpus, status.processes, status.phase) == (None, None, (), 0, "")
    assert told(Stopped(run=RUN)).changes == ()
    assert told(Backoff(run=RUN, rung=P2P_OFF, until=204.5)).retry_in_s == 4.5
    assert told(Backoff(run=RUN, rung=P2P_OFF, until=1.0)).retry_in_s == 0.0


def test_attempts_are_told_with_their_cause_advice_and_evidence_and_the_running_one_comes_last() -> None:
    first, second, running = told(STARTING).attempts
    assert (first.outcome, first.cause, first.ended_ago_s) == ("stalled", STALL.cause, 110.0)
    assert (first.summary, first.advice, first.evidence) == (STALL.summary, STALL.advice, STALL.evidence)
    assert (second.outcome, second.cause, second.evidence) == ("stopped", "", ())
    assert (running.number, running.outcome, running.duration_s, running.ended_ago_s) == (3, "running", 100.0, None)
    assert told(READY).attempts[-1].outcome == "ready"
    assert len(told(Stopped(run=RUN)).attempts) == 2


def test_the_ladder_shows_what_was_tried_what_runs_and_what_comes() -> None:
    rungs = report.ladder(READY, POLICY)
    assert [(rung.name, rung.standing) for rung in rungs] == [
        ("base", "tried"), ("p2p-off", "current"), ("p2p-off+utilisation-0.85", "next"), ("p2p-off+utilisation-0.80", "later"),
        ("p2p-off+utilisation-0.80+tp-1", "later"),
    ]  # fmt: skip
    assert rungs[0].changes == ()
    assert rungs[-1].changes == (
        "NCCL_P2P_DISABLE=1",
        "--disable-custom-all-reduce",
        "--gpu-memory-utilization 0.9 -> 0.8",
        "GPUs GPU-a,GPU-b -> GPU-a",
        "--tensor-parallel-size 2 -> 1",
    )


def test_before_the_first_attempt_the_base_comes_next_and_so_it_does_once_stopped() -> None:
    for run in (Run(), RUN):
        standings = [rung.standing for rung in report.ladder(Stopped(run=run), POLICY)]
        assert standings == ["next", "later", "later", "later", "later"]


def test_once_stopped_what_comes_next_is_led_around_gpus_that_are_out() -> None:
    out = {"GPU-b": "it is lost"}
    rungs = report.ladder(Stopped(run=replace(RUN, out=out)), POLICY)
    assert [(rung.name, rung.standing) for rung in rungs][:2] == [("base", "tried"), ("tp-1", "next")]
    pinned = replace(POLICY, ladder=replace(POLICY.ladder, areas=BY_DEFAULT - {Area.GPUS}))
    assert [rung.name for rung in report.ladder(Stopped(run=Run(out=out)), pinned)] == ["base"]


def _everywhere() -> list[World]:
    backoff = loading().say(NOT_FREE).exits(1).gone()
    ending = serving()
    ending.stop()
    return [World(), loading(), loading().watch(60.0), backoff, serving(), ending]


def test_a_status_survives_the_socket_unchanged() -> None:
    states = [world.state for world in _everywhere()]
    states += [READY, STARTING, Failed(run=RUN, status=69, message="m"), Killing(run=RUN, since=1.0, then=Fail(status=69, message="m"), why="w")]  # fmt: skip  # noqa: E501
    for state in states:
        status = told(state, at=5000.0)
        document = json.loads(json.dumps(control_api.status_to_json(status)))
        assert control_api.status_from_json(document) == status


def test_a_rung_survives_the_socket_unchanged() -> None:
    for rung in report.ladder(READY, POLICY):
        assert control_api.rung_from_json(json.loads(json.dumps(control_api.rung_to_json(rung)))) == rung


def test_keys_of_a_newer_daemon_are_left_out_and_missing_ones_are_an_error() -> None:
    document = control_api.status_to_json(told(STARTING))
    newer = json.loads(json.dumps({**document, "mood": "good"}))
    newer["attempts"][0]["mood"] = newer["gpus"][0]["mood"] = "good"
    assert control_api.status_from_json(newer) == told(STARTING)
    del newer["headline"]
    with pytest.raises(KeyError):
        control_api.status_from_json(newer)
