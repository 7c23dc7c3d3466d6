"""A recording judged again: every outcome, and the header that says how it was judged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu_llm.core import recorded_policy, recording, remedies
from mgpu_llm.core.diagnosis import Clue, of_exit
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.history import PastStart
from mgpu_llm.core.ladder import BASE as BASE_RUNG
from mgpu_llm.core.ladder import Ladder, Nvlink
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.recorded_policy import policy_of
from mgpu_llm.core.recording import Recording, RecordingError, Row, cut, note
from mgpu_llm.core.remedies import Area, Remedy
from mgpu_llm.core.replay import Suspected, judge, to_json
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from mgpu_llm.core.states import Policy, Run
from tests.core.world import (
    BAD_FLAG,
    BANNER,
    BASE,
    NCCL,
    NOT_FREE,
    ON_CPU,
    OUT_OF_MEMORY,
    P2P_OFF,
    UP,
    failed,
    policy,
    rungs,
)


def said(t: float, text: str) -> Row:
    return {"t": t, "kind": "log", "line": text}


def seen(t: float, rss: int = 1 << 30, **process: object) -> Row:
    return {"t": t, "kind": "sample", "procs": [{"pid": 702, "name": "vllm", "rss": rss, **process}]}


def looked(t: float, *frames: str) -> Row:
    return {"t": t, "kind": "stacks", "stacks": [{"pid": 702, "frames": list(frames)}]}


def quiet(begin: float, end: float) -> list[Row]:
    """A sample each half second in which nothing moves."""
    return [seen(begin + 0.5 * step) for step in range(int((end - begin) * 2) + 1)]


BOOTED = [said(0.5, BANNER), seen(0.5), said(1.0, NCCL)]
HUNG = [*BOOTED, *quiet(1.5, 60.0)]


def recorded(*rows: Row, header: Row | None = None) -> Recording:
    return cut(sorted([*([header] if header else []), *rows], key=lambda row: row["t"]))


def header(policy: Policy, run: Run, **changes: object) -> Row:
    """As it comes back from a file, with `changes`."""
    row: Row = json.loads(json.dumps(recorded_policy.header(policy, run)))
    return {**row, **changes}


# -- outcomes --------------------------------------------------------------------------------------------------------


def test_a_start_that_came_to_service_is_healthy() -> None:
    report = judge(recorded(*BOOTED, seen(1.5), said(2.0, UP), seen(2.5), note(3.0, "healthy"), said(9.0, "clean-up")))
    assert (report.outcome, report.verdict_at, report.phase) == ("healthy", None, "serving")
    assert (report.cause, report.decision, report.summary, report.advice, report.evidence) == (None, None, "", "", ())
    assert (report.last_progress_at, report.ended_at) == (2.0, 3.0)
    assert [(phase.name, phase.began_s, phase.took_s) for phase in report.phases] == [
        ("boot", 0.0, 1.0), ("distributed-init", 1.0, 1.0), ("api", 2.0, 1.0)
    ]  # fmt: skip
    assert [phase.longest_quiet_s for phase in report.phases] == [0.0, 0.5, 0.5]
    assert report.phases[1].patience_s == DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]


def test_a_hang_is_stalled_with_what_would_have_been_done() -> None:
    report = judge(recorded(*HUNG, note(61.0, "limit")))
    assert (report.outcome, report.phase, report.cause) == (
        "stalled",
        "distributed-init",
        "stalled-in-distributed-init",
    )
    assert report.verdict_at == report.ended_at == 17.0
    assert report.last_progress_at == 1.0
    assert report.decision == "step to rung p2p-off"
    assert report.summary == "stalled in distributed-init: nothing moved for 16 s"
    assert "NCCL" in report.advice
    assert any("no answer within 7 s" in word for word in report.evidence)
    assert report.suspicions == (Suspected(at_s=9.0, phase="distributed-init", cleared_s=None, why=""),)
    assert (report.phases[-1].took_s, report.phases[-1].longest_quiet_s) == (16.0, 15.5)


def test_stacks_in_the_recording_confirm_or_clear_as_they_did() -> None:
    confirmed = judge(recorded(*HUNG, looked(9.1, "f (x.py:1)"), looked(11.6, "f (x.py:1)")))
    assert (confirmed.outcome, confirmed.verdict_at) == ("stalled", 11.6)
    cleared = judge(recorded(*BOOTED, *quiet(1.5, 15.0), looked(9.1, "f (x.py:1)"), looked(11.6, "f (x.py:2)")))
    assert cleared.outcome == "running"
    assert cleared.suspicions == (
        Suspected(at_s=9.0, phase="distributed-init", cleared_s=11.6, why="its stacks are not where they were"),
    )


def test_an_exit_is_a_crash_with_its_error() -> None:
    report = judge(recorded(*BOOTED, said(2.0, "ValueError: no"), note(3.0, "exit", rc=-9)))
    assert (report.outcome, report.cause, report.verdict_at) == ("crashed", "engine-exited", 3.0)
    assert report.summary == "the engine ended in distributed-init with signal 9 (SIGKILL): ValueError: no"
    assert report.decision == "try again on rung base after 2 s"


def test_what_was_refused_is_a_crash_that_nobody_repeats() -> None:
    report = judge(recorded(said(0.5, BAD_FLAG), note(1.0, "exit", rc=2)))
    assert (report.outcome, report.cause, report.phase) == ("crashed", "bad-arguments", "boot")
    assert report.decision == "give up (exit status 65)"


def test_a_recording_that_breaks_off_before_there_is_anything_to_tell_is_running() -> None:
    report = judge(recorded(*BOOTED, seen(1.5)))
    assert (report.outcome, report.cause, report.decision, report.verdict_at) == ("running", None, None, None)
    assert (report.phase, report.ended_at) == ("distributed-init", 1.5)


def test_a_recording_that_breaks_off_after_the_engine_named_its_failure_is_the_crash_it_would_have_been() -> None:
    report = judge(recorded(*BOOTED, said(2.0, NOT_FREE), seen(2.5), note(3.0, "limit")))
    assert (report.outcome, report.cause, report.verdict_at) == ("crashed", "gpu-not-free", None)
    assert report.decision == "try again on rung base after 2 s"
    assert report.evidence


def test_a_recording_of_nothing_is_running() -> None:
    report = judge(cut([]))
    assert (report.outcome, report.phase, report.ended_at) == ("running", "boot", 0.0)
    assert [phase.name for phase in report.phases] == ["boot"]


def test_rows_out_of_order_do_not_turn_the_clock_back() -> None:
    rows = (seen(5.0), said(3.0, "late"), seen(5.5))
    report = judge(cut([*BOOTED, *rows]))
    assert report.last_progress_at == 5.0
    assert report.ended_at == 5.5


def test_a_broken_row_is_refused() -> None:
    with pytest.raises(RecordingError, match=r"the sample row at t=2\.0 has a field of a wrong type"):
        judge(recorded(*BOOTED, {"t": 2.0, "kind": "sample", "procs": [{}]}))


def test_a_report_is_one_json_document_with_times_in_milliseconds() -> None:
    report = replace(judge(recorded(*HUNG)), last_progress_at=1.00049)
    document = json.loads(json.dumps(to_json(report)))
    assert document["last_progress_at"] == 1.0
    assert document["verdict_at"] == 17.0
    assert document["phases"][0] == {
        "name": "boot", "began_s": 0.0, "took_s": 1.0, "longest_quiet_s": 0.0, "patience_s": 25.0
    }  # fmt: skip
    assert document["suspicions"] == [{"at_s": 9.0, "phase": "distributed-init", "cleared_s": None, "why": ""}]


# -- without a header ------------------------------------------------------------------------------------------------


def test_without_a_header_the_ladder_is_for_as_many_gpus_as_were_seen() -> None:
    gpus = {"t": 1.0, "kind": "sample", "gpus": [{"mem": 1}, {"mem": 1}, {"mem": 1}, {"mem": 1}]}
    seen = policy_of(recorded(gpus))
    assert [rung.name for rung in rungs(seen)][:2] == ["base", "p2p-off"]
    assert (seen.ladder.base.tensor_parallel, seen.ladder.sizes) == (4, (2, 1))
    unseen = {"t": 1.0, "kind": "unobserved", "why": "x"}
    assert policy_of(recorded(unseen)).ladder.base.gpus is not None
    assert policy_of(recorded(*BOOTED)).ladder.base.gpus is None


def test_the_ladder_of_an_older_daemon_says_whether_there_were_gpus_and_how_many() -> None:
    old = note(
        0.0, "attempt", attempt=2, rung="p2p-off", tp=4, rungs=[["base", "base", True], ["p2p-off", "transport", True]]
    )
    ladder = policy_of(recorded(*BOOTED, header=old)).ladder
    assert ladder.base == Launch(gpus=("0", "1", "2", "3"), tensor_parallel=4, utilisation=0.9)
    assert judge(recorded(*HUNG, header=old)).decision == "step to rung p2p-off+loopback"


def test_without_a_header_patience_and_the_rest_are_the_defaults() -> None:
    judged, default = policy_of(recorded(*BOOTED)), policy(ON_CPU)
    same = replace(judged, ladder=default.ladder, learn_factor=5.0)
    assert same == replace(default, incidents="", utc_s=0.0)
    assert judged.ladder == replace(default.ladder, floor=0.7)


def test_gpus_that_were_never_seen_lengthen_the_patience() -> None:
    missed = {"t": 1.2, "kind": "unobserved", "why": "NVML did not answer"}
    report = judge(recorded(*HUNG, missed))
    assert report.verdict_at == pytest.approx(3 * 16.0 + 1.0)


# -- the header ------------------------------------------------------------------------------------------------------

TAUGHT = PastStart(
    launch="k", model="/m", at="2026-11-24T21:05:00Z", duration_s=99.0, phase_s={}, quiet_s={"distributed-init": 6.0}
)
MADE_SO = policy(
    BASE,
    past=(TAUGHT,),
    attempts=7,
    tries_per_cause=6,
    crashes_per_rung=3,
    backoff_jitter=0.5,
    seed=11,
    backoff_s=1.5,
    backoff_ceiling_s=9.0,
    weights_bytes=15_200_000_000,
)
LADDER = header(MADE_SO, Run())["ladder"]
CRASH = of_exit(1, Phase.BOOT, Clue(), retries=2)
RUN = Run(attempt=5, rung=P2P_OFF, tries=4, ended=failed(CRASH, BASE_RUNG, BASE_RUNG, P2P_OFF))


TRIED = replace(RUN, trial=P2P_OFF, rung=BASE_RUNG)
DYING = replace(RUN, deaths=2)


def test_the_policy_of_a_header_judges_as_the_policy_it_was_made_of() -> None:
    given = policy_of(recorded(*BOOTED, header=header(MADE_SO, RUN)))
    assert given.allowed == MADE_SO.allowed
    assert given.allowed[Phase.DISTRIBUTED_INIT] == 30.0
    numbers = (
        "attempts",
        "tries_per_cause",
        "crashes_per_rung",
        "backoff_s",
        "backoff_ceiling_s",
        "backoff_jitter",
        "seed",
    )
    for name in (*numbers, "weights_bytes", "look_at_stacks"):
        assert getattr(given, name) == getattr(MADE_SO, name), name
    assert given.ladder == MADE_SO.ladder
    again = header(given, RUN)
    assert again == header(MADE_SO, RUN), "and so on, for ever"


@pytest.mark.parametrize("made_so", [MADE_SO, policy(ON_CPU), policy(BASE, look_at_stacks=False), policy(attempts=4)])
@pytest.mark.parametrize("rows", [HUNG, [*BOOTED, said(2.0, OUT_OF_MEMORY), note(3.0, "exit", rc=1)], [*BOOTED, note(3.0, "exit", rc=1)]])  # fmt: skip # noqa: E501
@pytest.mark.parametrize("run", [RUN, Run(attempt=1, tries=1), TRIED, DYING])
def test_a_recording_with_a_header_is_judged_as_its_policy_judges_it(
    made_so: Policy, rows: list[Row], run: Run
) -> None:
    with_header = recorded(*rows, header=header(made_so, run))
    assert judge(with_header) == judge(with_header, made_so)


def test_a_header_says_on_which_rung_and_in_which_try_it_was() -> None:
    crashed, steady = [*BOOTED, note(3.0, "exit", rc=1)], replace(MADE_SO, backoff_jitter=0.0)
    first = judge(recorded(*crashed, header=header(steady, replace(RUN, ended=RUN.ended[:2], tries=3))))
    assert first.decision == "try again on rung p2p-off after 1.5 s"
    twice = replace(RUN, ended=failed(CRASH, BASE_RUNG, P2P_OFF), tries=3)
    second = judge(recorded(*crashed, header=header(steady, twice)))
    assert second.decision == "try again on rung p2p-off after 3 s"
    assert judge(recorded(*crashed, header=header(steady, RUN))).decision == "step to rung p2p-off+utilisation-0.85"
    last = judge(recorded(*crashed, header=header(steady, replace(RUN, struggle=7))))
    assert last.decision == "give up (exit status 69)"
    tried = replace(RUN, trial=P2P_OFF, rung=BASE_RUNG)
    assert (
        judge(recorded(*crashed, header=header(steady, tried))).decision
        == "go back to rung p2p-off, which served before"
    )


@pytest.mark.parametrize(
    "ladder",
    [
        Ladder(base=replace(BASE, env={"NCCL_P2P_DISABLE": "1"}), nvlink=Nvlink.ALL),
        Ladder(base=ON_CPU, sizes=(1,), areas=frozenset(), one_host=False),
        Ladder(
            base=remedies.P2P_OFF.over(BASE), spares=("2", "3"), context=4096, nvlink=Nvlink.SOME, pipeline_parallel=2
        ),
        Ladder(base=BASE, own=(Remedy(name="mine"), Remedy(name="other")), step=0.1, floor=0.2, ceiling=0.9),
        Ladder(base=BASE, areas=frozenset(Area)),
    ],
)
def test_every_part_of_a_ladder_comes_back_from_the_header(ladder: Ladder) -> None:
    made_so = policy(ladder=ladder)
    assert policy_of(recorded(*BOOTED, header=header(made_so, Run()))).ladder == ladder


def test_stacks_that_were_switched_off_are_not_asked_for_again() -> None:
    blind = header(policy(ON_CPU, look_at_stacks=False), RUN)
    report = judge(recorded(*HUNG, looked(9.1, "f (x.py:1)"), looked(11.6, "f (x.py:1)"), header=blind))
    assert report.verdict_at == 17.0
    assert any("heartbeat.stacks is false" in word for word in report.evidence)


def test_the_size_of_the_weights_comes_from_the_header() -> None:
    assert policy_of(recorded(header=header(MADE_SO, RUN))).weights_bytes == 15_200_000_000
    assert policy_of(recorded(header=header(policy(), RUN))).weights_bytes is None


def test_a_header_of_an_older_daemon_leaves_the_rest_to_the_defaults() -> None:
    old = note(0.0, "attempt", attempt=3)
    given = policy_of(recorded(*BOOTED, header=old))
    assert given.patience == DEFAULT_PATIENCE_S
    assert judge(recorded(*HUNG, header=old)).outcome == "stalled"


def test_a_policy_that_does_not_know_the_rung_judges_it_as_its_base() -> None:
    other = recorded(*HUNG, header=header(MADE_SO, RUN))
    mine = replace(MADE_SO, ladder=Ladder(base=BASE, own=(Remedy(name="mine"),)), past=())
    assert judge(other, mine).decision == "step to rung mine"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "it has format 2, and this version knows 1"),
        ({"format": None}, "it has format None, and this version knows 1"),
        ({"rung": "nowhere"}, 'there is no rung "nowhere"'),
        ({"rung": None}, "'NoneType' object has no attribute 'split'"),
        ({"ladder": 5}, "'int' object is not subscriptable"),
        ({"ladder": {**LADDER, "steps": [0.0, 0.7, 0.95]}}, "a step of the utilisation is no fraction"),
        ({"ladder": {**LADDER, "may_change": ["all"]}}, "'all' is not a valid Area"),
        ({"ladder": {**LADDER, "has": ["x"]}}, "'x'"),
        ({"ladder": None, "tp": 10**9}, "1000000000 is not from 1 to 1024"),
        ({"failed": [{"rung": "base"}]}, "'cause'"),
        ({"tries": -5}, "-5 is not from 0 to 100000"),
        ({"crashes_per_rung": 10**9}, "1000000000 is not from 1 to 1000"),
        ({"ladder": {**LADDER, "sizes": [-1]}}, "-1 is not from 1 to 1024"),
        ({"ladder": {**LADDER, "spares": ["1"] * 2000}}, "it lists more than 1024 of something"),
        ({"ladder": {**LADDER, "utilisation": float("nan")}}, "nan is no number to go by"),
        ({"backoff": [float("inf"), 60.0]}, "inf is no number to go by"),
        ({"rung": "+".join(["eager"] * 20_000)}, 'there is no rung "' + "eager+" * 13 + 'ea"'),
        ({"ladder": None, "tp": "x"}, "invalid literal for int() with base 10: 'x'"),
        ({"patience": {"boot": "x"}}, "could not convert string to float: 'x'"),
        ({"patience": {"boot": float("nan")}}, "a patience is no time in seconds"),
        ({"patience": {"boot": float("inf")}}, "a patience is no time in seconds"),
        ({"patience": {"boot": 0}}, "a patience is no time in seconds"),
        ({"patience": 5}, "'int' object has no attribute 'get'"),
        ({"attempts": None}, "int() argument must be a string, a bytes-like object or a real number, not 'NoneType'"),
        ({"attempts": float("inf")}, "cannot convert float infinity to integer"),
        ({"backoff": 5}, "Value after * must be an iterable, not int"),
        ({"weights_bytes": "x"}, "invalid literal for int() with base 10: 'x'"),
        ({"weights_bytes": 10**400}, "it has more than 64 bits"),
        ({"attempt": "x"}, "invalid literal for int() with base 10: 'x'"),
        ({"tries": None}, "int() argument must be a string, a bytes-like object or a real number, not 'NoneType'"),
        ({"deaths": float("inf")}, "cannot convert float infinity to integer"),
    ],
)
def test_a_broken_header_is_refused_in_one_line(changes: dict[str, object], why: str) -> None:
    with pytest.raises(RecordingError) as refused:
        judge(recorded(*BOOTED, header=header(MADE_SO, RUN, **changes)))
    assert str(refused.value) == f"its first row is broken: {why}"


def test_a_header_is_the_first_row_and_has_no_time_of_its_own() -> None:
    row = recorded_policy.header(MADE_SO, RUN)
    assert (row["t"], row["kind"], row["what"], row["format"]) == (0.0, "note", "attempt", recording.FORMAT)
    assert (row["attempt"], row["rung"], row["ladder"]["tp"]) == (5, "p2p-off", 2)
