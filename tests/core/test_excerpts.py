"""What engines really said and what was really seen of them: each must be diagnosed as people diagnosed it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mgpu_llm.core import diagnosis, replay, symptoms
from mgpu_llm.core.diagnosis import Clue, of_stall
from mgpu_llm.core.engine_log import parse
from mgpu_llm.core.signatures import Kind, Role, Rule, Signature, Where
from mgpu_llm.core.stall import Stalled
from tests.bench import diagnosis as bench
from tests.support import excerpts, recordings
from tests.support.excerpts import Excerpt, Stall

ROWS = {row.id: row for row in diagnosis.TABLE}
QUOTED = excerpts.quoted()
RECORDED = excerpts.recorded()
STALLS = excerpts.stalls()
SAID = [excerpt for excerpt in QUOTED if not excerpt.near]
PAGE = (Path(__file__).resolve().parents[2] / "docs/diagnosis.md").read_text(encoding="utf-8")
#: The share of all excerpts and recordings in which the cause must be right.
BAR = 0.95


def matching(excerpt: Excerpt) -> set[str]:
    """The rows whose words are in the lines, each line looked at as the daemon looks at it."""
    return {
        row.id
        for line in excerpt.lines
        for row in diagnosis.TABLE
        if row.match(line if excerpt.kernel else parse(line).message)
        if (row.where is Where.KERNEL) is excerpt.kernel
    }


def about(excerpt: Excerpt | Stall) -> str:
    return f"{excerpt.row}: {excerpt.origin}"


def _of_words(row: Signature) -> bool:
    return row.stall is None and row.where is not Where.EXIT


def test_every_row_has_an_excerpt_and_something_near_that_it_must_not_take_for_one() -> None:
    told = {(excerpt.row, excerpt.near) for excerpt in QUOTED} | {(stall.row, stall.near) for stall in STALLS}
    # What our own check says is no report of anybody's: its stories are in test_stories_of_preflight.
    ours = {row.id for row in diagnosis.TABLE if row.where is Where.PREFLIGHT}
    assert told == {(name, near) for name in ROWS.keys() - ours for near in (False, True)}


@pytest.mark.parametrize("excerpt", SAID, ids=about)
def test_the_words_of_a_row_are_in_its_excerpt_and_its_cause_is_diagnosed(excerpt: Excerpt) -> None:
    row = ROWS[excerpt.row]
    found = excerpts.diagnose(excerpt)
    if _of_words(row):
        assert row.id in matching(excerpt)
    if excerpt.cause:
        assert found.cause == excerpt.cause
        assert found.advice
    else:
        assert found.cause == "engine-exited", "these lines name no cause"


@pytest.mark.parametrize("excerpt", [excerpt for excerpt in QUOTED if excerpt.near], ids=about)
def test_what_only_resembles_a_row_does_not_match_it(excerpt: Excerpt) -> None:
    assert excerpt.row not in matching(excerpt)
    assert excerpt.status == 1


@pytest.mark.parametrize("name", RECORDED)
def test_a_start_that_was_broken_on_purpose_is_diagnosed_with_what_broke_it_and_its_cure(name: str) -> None:
    excerpt = RECORDED[name]
    found = excerpts.diagnose(excerpt)
    assert found.cause == excerpt.cause
    if excerpt.wants:
        wanted = [row.wants for row in diagnosis.TABLE if row.reported_as == found.cause and row.advice == found.advice]
        assert excerpt.wants in wanted


def test_every_recorded_start_has_its_expectation_and_the_other_way_round() -> None:
    files = {path.name.removesuffix(".log.gz") for path in (excerpts.FOLDER / "recorded").iterdir()}
    assert files == set(RECORDED)


@pytest.mark.parametrize("stall", STALLS, ids=about)
def test_a_stall_is_told_by_its_row_and_not_by_one_that_it_only_resembles(stall: Stall) -> None:
    row = symptoms.explain(stall.stalled, diagnosis.TABLE)
    found = of_stall(stall.stalled, Clue())
    assert (row.id == stall.row) is not stall.near
    assert found.cause == stall.cause
    assert found.outcome == "stalled"
    assert found.summary.startswith(f"stalled in {stall.stalled.phase.label}: nothing moved for 30 s")
    assert "{" not in found.summary


# -- roots, cascades, teardowns ----------------------------------------------------------------------------------------

ROOTS = [excerpt for excerpt in SAID if excerpt.cause and ROWS[excerpt.row].role is Role.ROOT and not excerpt.kernel]
CASCADES = tuple(
    line
    for excerpt in SAID
    if ROWS[excerpt.row].role is not Role.ROOT and excerpt.cause in ("", excerpt.row)
    for line in excerpt.lines
)


@pytest.mark.parametrize("excerpt", ROOTS, ids=about)
def test_no_cascade_before_a_root_or_after_it_hides_it(excerpt: Excerpt) -> None:
    for lines in ((*CASCADES, *excerpt.lines), (*excerpt.lines, *CASCADES)):
        among = Excerpt(row="", cause="", phase=excerpt.phase, origin="", lines=lines)
        assert excerpts.diagnose(among).cause == excerpt.cause


def test_a_cascade_is_the_cause_only_where_no_other_error_was_named_before_it() -> None:
    vanished = (
        "(EngineCore pid=3) ERROR 11-24 22:04:33 [core.py:1510] Exception: WorkerProc initialization failed due to an exception "
        "in a background process."
    )
    known = Excerpt(row="", cause="", phase=excerpts.PHASES["weights"], origin="", lines=("KeyError: 'x'", vanished))
    assert excerpts.diagnose(known).cause == "engine-exited"
    assert "KeyError: 'x'" in excerpts.diagnose(known).summary
    unknown = Excerpt(row="", cause="", phase=excerpts.PHASES["weights"], origin="", lines=(vanished, "KeyError: 'x'"))
    assert excerpts.diagnose(unknown).cause == "worker-vanished"


def test_a_worker_that_said_itself_that_it_failed_has_not_vanished() -> None:
    lines = (
        "(Worker pid=3) ERROR 11-24 22:04:33 [multiproc_executor.py:953] WorkerProc failed to start.",
        "(Worker pid=3) ERROR 11-24 22:04:33 [multiproc_executor.py:953] torch._dynamo.exc.Unsupported: no words for it",
        "(EngineCore pid=2) ERROR 11-24 22:04:33 [core.py:1510] EngineCore failed to start.",
        "(EngineCore pid=2) ERROR 11-24 22:04:33 [core.py:1510] Exception: WorkerProc initialization failed due to an exception.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    )
    said = Excerpt(row="", cause="", phase=excerpts.PHASES["weights"], origin="", lines=lines)
    assert excerpts.diagnose(said).cause == "engine-exited"


def test_the_first_of_several_cascades_stands() -> None:
    timeout, killed = (
        next(excerpt.lines[0] for excerpt in SAID if excerpt.row == name) for name in ("nccl-watchdog", "worker-killed")
    )
    both = Excerpt(row="", cause="", phase=excerpts.PHASES["api"], origin="", lines=(timeout, killed))
    assert excerpts.diagnose(both).cause == "nccl-watchdog"


# -- what shows only later, and the kernel -----------------------------------------------------------------------------


def test_what_may_matter_later_is_told_with_the_diagnosis_once_and_only_the_first_few() -> None:
    ulimit = "WARNING 11-24 22:08:01 [x.py:255] Found ulimit of {} and failed to automatically increase with error x"
    lines = tuple(ulimit.format(number) for number in (4096, 4096, 1, 2, 3, 4, 5, 20000))
    found = excerpts.diagnose(Excerpt(row="", cause="", phase=excerpts.PHASES["boot"], origin="", lines=lines))
    assert found.cause == "engine-exited"
    assert found.evidence == tuple(f"the engine may open {number} files only" for number in (4096, 1, 2, 3, 4))


def test_lines_of_the_kernel_name_a_cause_and_other_lines_of_the_kernel_do_not() -> None:
    clue = diagnosis.look_at_kernel(Clue(), "usb 1-1: new high-speed USB device")
    assert clue == Clue()
    xid = "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus."
    named = diagnosis.look_at_kernel(clue, xid)
    assert (named.cause, named.line) == ("gpu-lost", xid)
    assert (
        "GPU 0000:44:00 has fallen off the bus"
        in diagnosis.of_exit(1, excerpts.PHASES["weights"], named, retries=1).summary
    )


def test_what_the_kernel_said_is_no_word_of_the_engine() -> None:
    said = "(Worker pid=3) ERROR 11-24 22:04:33 [x.py:1] NVRM: Xid (PCI:0000:44:00): 94, pid=1027"
    assert (
        excerpts.clue_of(Excerpt(row="", cause="", phase=excerpts.PHASES["boot"], origin="", lines=(said,))).cause == ""
    )


# -- rules -------------------------------------------------------------------------------------------------------------


def test_what_nobody_could_see_does_not_hold() -> None:
    unseen = Stalled(phase=excerpts.PHASES["warm-up"], idle_s=30.0, patience_s=25.0, spinning=None)
    for name in ("nccl-p2p", "nccl-bootstrap", "custom-all-reduce", "driver-stuck", "hub-silent", "gloo-rendezvous"):
        rule = ROWS[name].stall
        assert rule is not None
        assert not symptoms.holds(rule, unseen), name
    assert not symptoms.holds(Rule(spinning=True), unseen)
    assert not symptoms.holds(Rule(gpu_memory_below_gb=100.0), unseen)


def test_a_gpu_whose_utilisation_is_unknown_leaves_open_whether_all_spin() -> None:
    stall = next(stall for stall in STALLS if stall.row == "nccl-p2p-unseen" and not stall.near)
    first, second = stall.stalled.gpus
    unknown = type(second)(uuid=second.uuid, used_bytes=second.used_bytes)
    half_seen = type(stall.stalled)(**{**vars(stall.stalled), "gpus": (first, unknown)})
    assert of_stall(half_seen, Clue()).cause == "stalled-in-distributed-init"


def test_whether_something_spins_can_be_asked_for() -> None:
    spinning = Stalled(phase=excerpts.PHASES["warm-up"], idle_s=30.0, patience_s=25.0, spinning=True)
    assert symptoms.holds(Rule(spinning=True), spinning)
    assert not symptoms.holds(Rule(spinning=False), spinning)


# -- the bar -----------------------------------------------------------------------------------------------------------


def test_at_least_so_many_of_all_excerpts_and_recordings_have_the_right_cause_and_no_healthy_start_has_any() -> None:
    cases = bench.cases()
    assert len(cases) > 180
    assert sum(case.right for case in cases) >= BAR * len(cases)
    for name, expected in recordings.expected().items():
        if expected.outcome == "healthy":
            assert replay.judge(recordings.load(name)).cause is None


def test_nearly_all_of_them_are_answered_first_with_what_cures_them() -> None:
    cases = bench.cases()
    assert sum(case.cured for case in cases) >= BAR * len(cases)


def test_none_ends_wrongly_or_at_too_high_a_price_but_as_the_page_lists() -> None:
    assert [why for why in bench.bad_ends(bench.cases()) if f"- {why} (" not in PAGE] == [], "make bench-diagnosis"


def test_what_truly_cures_them_is_known_for_every_cause_and_said_of_nothing_else() -> None:
    cases, cures = bench.cases(), excerpts.cures()
    assert {case.cause for case in cases} == set(cures.by_cause)
    assert set(cures.by_row) <= set(ROWS)
    assert set(cures.by_name) <= {case.name for case in cases}


def test_the_page_has_every_cause_with_its_number_of_failures() -> None:
    cases = bench.cases()
    for cause, failures in Counter(case.cause for case in cases).items():
        assert f"| {cause} | {failures} |" in PAGE, "make bench-diagnosis"


def test_a_wrong_cause_is_rarer_than_an_unknown_one() -> None:
    cases = bench.cases()
    assert sum(case.wrong for case in cases) <= 0.01 * len(cases)


def test_the_table_of_the_bench_has_a_row_for_each_cause_and_the_sum() -> None:
    cases = bench.cases()
    table = bench.table(cases)
    for case in cases:
        assert f"| {case.cause} |" in table
    assert f"| all | {len(cases)} |" in table
    assert ROWS["torch-compile"].kind is Kind.SLOW
