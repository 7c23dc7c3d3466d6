"""How far a load has come and how long it will take, as it is told to people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import outlook, report
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.history import PastStart
from mgpu_llm.core.ladder import BASE as BASE_RUNG
from mgpu_llm.core.launch import Server
from mgpu_llm.core.progress import Progress, begin
from mgpu_llm.core.states import Policy, Run, Starting
from mgpu_llm.core.status import Count, PhaseStatus
from mgpu_llm.core.suspicion import Finding, Suspicion
from mgpu_llm.core.weights import Loading
from tests.core.looks import unanswered
from tests.core.world import BASE, ON_CPU, P2P_OFF, loading, policy

TOTAL = 104_000_000_000
#: 38 % in, 120 MB/s: 537 s to go.
COMING = Loading(read_from=0.0, held_from=0.0, points=((170.0, 35_920_000_000.0), (200.0, 39_520_000_000.0)))
WEIGHTS = replace(
    begin(100.0, TOTAL),
    phase=Phase.WEIGHTS,
    phase_began={Phase.BOOT: 100.0, Phase.DISTRIBUTED_INIT: 120.0, Phase.WEIGHTS: 130.0},
    spoke_known_words=True,
    shards=Count(done=3, total=8),
    weights=COMING,
)
#: The last start like this one.
PAST = PastStart(
    launch="k",
    model="/m",
    at="2026-11-24T21:05:00Z",
    duration_s=1100.0,
    phase_s={"boot": 21.0, "distributed-init": 9.0, "weights": 900.0, "kv-cache": 10.0, "warm-up": 150.0, "api": 10.0},
    quiet_s={"weights": 7.0},
)
UNKNOWN = policy()
SERVER = Server(command=("vllm", "serve"), model="/m")
KNOWN = policy(BASE, server=SERVER)
KNOWN = replace(KNOWN, past=(replace(PAST, launch=KNOWN.history_key(BASE_RUNG)),))


def starting(heart: Progress, **changes: object) -> Starting:
    return Starting(**{"run": Run(attempt=1, tries=1), "since": 100.0, "progress": heart, "pid": 702, **changes})  # type: ignore[arg-type]


def of(heart: Progress, known: Policy = UNKNOWN, at: float = 200.0) -> outlook.Outlook:
    return outlook.of(starting(heart), known, at)


# -- the one line ----------------------------------------------------------------------------------------------------


def test_the_headline_says_phase_percent_shards_rate_and_what_is_left() -> None:
    quiet = starting(replace(WEIGHTS, quiet_s=4.4))
    assert report.headline(quiet, UNKNOWN, 200.0) == (
        "loading: weights 38 %, shards 3/8, 120 MB/s, about 9 min left, 100 s, attempt 1 on rung base, quiet for 4 s"
    )


@pytest.mark.parametrize(
    ("heart", "words"),
    [
        (WEIGHTS, "weights 38 %, shards 3/8, 120 MB/s, about 9 min left"),
        (replace(WEIGHTS, shards=None), "weights 38 %, 120 MB/s, about 9 min left"),
        (replace(WEIGHTS, weights=replace(COMING, points=COMING.points[:1])), "weights 35 %, shards 3/8"),
        (replace(WEIGHTS, weights=replace(COMING, points=())), "weights 38 %, shards 3/8"),
        (replace(WEIGHTS, weights=None), "weights 38 %, shards 3/8"),
        (replace(WEIGHTS, weights=None, shards=None), "weights"),
        (replace(WEIGHTS, weights=None, shards=Count(done=0, total=0)), "weights, shards 0/0"),
        (replace(WEIGHTS, phase=Phase.COMPILE), "compile"),
        (replace(WEIGHTS, phase=Phase.WARM_UP, graphs=Count(done=9, total=51)), "warm-up, graphs 9/51"),
        (begin(100.0), "boot"),
    ],
    ids=["all", "no shards", "one point", "no point", "only shards", "nothing", "no shards at all", "after the weights",
         "graphs", "boot"],
)  # fmt: skip
def test_what_is_not_known_is_left_out(heart: Progress, words: str) -> None:
    assert of(replace(heart, phase_began={**heart.phase_began, heart.phase: 130.0})).words == words


def test_a_rate_that_is_nothing_is_told_and_leaves_no_estimate() -> None:
    stuck = replace(WEIGHTS, weights=replace(COMING, points=((170.0, 39.52e9), (200.0, 39.52e9))))
    assert of(stuck).words == "weights 38 %, shards 3/8, 0.0 MB/s"


@pytest.mark.parametrize(
    ("rate", "words"), [(1e4, "0.0 MB/s"), (4.24e6, "4.2 MB/s"), (1e7, "10 MB/s"), (2.5e9, "2500 MB/s")]
)
def test_a_rate_is_told_in_megabytes_however_large(rate: float, words: str) -> None:
    points = ((190.0, 1e9), (200.0, 1e9 + 10 * rate))
    assert words in of(replace(WEIGHTS, weights=replace(COMING, points=points))).words.split(", ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 s"), (4.4, "4 s"), (9.9, "10 s"), (12.0, "10 s"), (13.0, "15 s"), (87.0, "85 s"), (89.9, "90 s"), (90.0, "2 min"),
     (537.0, "9 min"), (5369.0, "89 min"), (5400.0, "1 h 30 min"), (7800.0, "2 h 10 min")],
)  # fmt: skip
def test_an_estimate_is_rounded_as_it_is_worth(seconds: float, words: str) -> None:
    points = ((199.0, 0.0), (200.0, 1e9))
    heart = replace(WEIGHTS, weights_bytes=int(1e9 * (1 + seconds)), weights=replace(COMING, points=points))
    assert of(heart).words.endswith(f"about {words} left")


# -- what is left ----------------------------------------------------------------------------------------------------


def test_without_a_past_only_the_rest_of_the_weights_can_be_told() -> None:
    assert of(WEIGHTS).left_s == pytest.approx((TOTAL - 39.52e9) / 120e6)
    assert of(replace(WEIGHTS, weights=None)).left_s is None
    assert of(replace(WEIGHTS, phase=Phase.COMPILE, phase_began={Phase.COMPILE: 190.0})).left_s is None


def test_with_a_past_the_phases_to_come_are_added() -> None:
    assert of(WEIGHTS, KNOWN).left_s == pytest.approx((TOTAL - 39.52e9) / 120e6 + 10.0 + 150.0 + 10.0)


def test_a_phase_that_cannot_be_counted_takes_what_is_left_of_its_usual_time() -> None:
    heart = replace(WEIGHTS, weights=None)
    assert of(heart, KNOWN, at=230.0).left_s == pytest.approx(800.0 + 170.0)
    assert of(heart, KNOWN, at=1029.0).left_s == pytest.approx(1.0 + 170.0)


def test_a_phase_that_takes_longer_than_usual_has_only_the_others_left() -> None:
    assert of(replace(WEIGHTS, weights=None), KNOWN, at=5000.0).left_s == pytest.approx(170.0)
    last = replace(WEIGHTS, phase=Phase.API, phase_began={Phase.API: 190.0})
    assert of(last, KNOWN, at=5000.0).left_s == 0.0


def test_a_phase_that_the_last_start_passed_over_is_expected_to_take_no_time() -> None:
    heart = replace(WEIGHTS, phase=Phase.COMPILE, phase_began={Phase.COMPILE: 190.0})
    assert of(heart, KNOWN).left_s == pytest.approx(170.0)


@pytest.mark.parametrize("known", [replace(KNOWN, ladder=policy(ON_CPU).ladder), policy(BASE, past=(PAST,)), UNKNOWN])
def test_a_start_of_another_launch_says_nothing_about_this_one(known: Policy) -> None:
    told = of(replace(WEIGHTS, weights=None), known)
    assert told.left_s is None
    assert {phase.usual_s for phase in told.phases} == {None}


def test_the_last_start_of_the_rung_it_runs_on_counts() -> None:
    known = replace(KNOWN, past=(replace(PAST, launch=KNOWN.history_key(P2P_OFF)),))
    heart = replace(WEIGHTS, weights=None)
    assert outlook.of(starting(heart), known, 200.0).left_s is None
    assert outlook.of(starting(heart, run=Run(attempt=2, rung=P2P_OFF)), known, 200.0).left_s is not None


# -- the phases ------------------------------------------------------------------------------------------------------


def test_each_phase_is_told_with_what_it_took_takes_and_usually_takes() -> None:
    by_name = {phase.name: phase for phase in of(WEIGHTS, KNOWN).phases}
    assert list(by_name) == [phase.label for phase in Phase]
    assert by_name["boot"] == PhaseStatus(
        name="boot", standing="done", took_s=20.0, usual_s=21.0, percent=None, patience_s=25.0, learnt=False
    )
    assert by_name["weights"] == PhaseStatus(
        name="weights", standing="current", took_s=70.0, usual_s=900.0, percent=38.0, patience_s=35.0, learnt=True
    )
    assert by_name["compile"] == PhaseStatus(
        name="compile", standing="to-come", took_s=None, usual_s=None, percent=None, patience_s=25.0, learnt=False
    )


def test_a_phase_that_was_passed_over_is_done_and_took_no_time_of_its_own() -> None:
    began = {Phase.BOOT: 100.0, Phase.WEIGHTS: 130.0, Phase.WARM_UP: 180.0}
    heart = replace(WEIGHTS, phase=Phase.WARM_UP, phase_began=began, graphs=Count(done=9, total=36))
    by_name = {phase.name: phase for phase in of(heart).phases}
    assert [(name, by_name[name].standing, by_name[name].took_s) for name in ("distributed-init", "compile")] == [
        ("distributed-init", "done", None),
        ("compile", "done", None),
    ]
    assert (by_name["boot"].took_s, by_name["weights"].took_s, by_name["warm-up"].took_s) == (30.0, 50.0, 20.0)
    assert (by_name["weights"].percent, by_name["warm-up"].percent) == (None, 25.0)


def test_the_status_tells_the_same() -> None:
    identity = report.Identity(version="1", model="m", url="u")
    told, seen = report.status(starting(WEIGHTS), KNOWN, 200.0, identity), of(WEIGHTS, KNOWN)
    assert (told.phases, told.weights_percent) == (seen.phases, seen.weights_percent)
    assert told.weights_bytes_per_s == pytest.approx(120e6)
    assert told.left_s == seen.left_s


# -- what is thought of a quiet --------------------------------------------------------------------------------------


def test_a_suspicion_is_told_with_what_is_done_about_it() -> None:
    doubt = Suspicion(since=190.0)
    quiet = replace(WEIGHTS, quiet_s=26.4)
    assert outlook.of(starting(quiet), UNKNOWN, 200.0).suspicion == ""
    assert outlook.of(starting(quiet, suspicion=doubt), UNKNOWN, 200.0).suspicion == (
        "suspected: nothing has moved for 26 s; looking where its threads stand"
    )
    blind = replace(doubt, finding=Finding.BLIND, blind="no ptrace")
    assert outlook.of(starting(quiet, suspicion=blind), UNKNOWN, 200.0).suspicion == (
        "suspected: nothing has moved for 26 s, and its stacks prove nothing (no ptrace); it is ended at 50 s"
    )


def test_while_nothing_moves_no_load_is_said_to_come_nearer() -> None:
    moving = outlook.of(starting(replace(WEIGHTS, quiet_s=4.9)), KNOWN, 200.0)
    standing = outlook.of(starting(replace(WEIGHTS, quiet_s=5.0)), KNOWN, 200.0)
    assert moving.left_s is not None
    assert standing.left_s is None
    assert "left" not in standing.words


def test_the_suspicion_of_a_live_load_is_in_its_status_and_goes_away_with_it() -> None:
    world = loading()
    world.stacks = unanswered
    identity = report.Identity(version="1", model="m", url="u")
    world.watch(9.0)
    assert report.status(world.state, world.policy, world.at, identity).suspicion.startswith("suspected: nothing has")
    world.say("something new").watch(0.5)
    assert report.status(world.state, world.policy, world.at, identity).suspicion == ""
