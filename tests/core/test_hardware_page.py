"""The page of the hardware bench says what was measured beside each goal, and what was not run."""

from __future__ import annotations

import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest

from tests.bench.hardware_goals import ALONE, OFF, OVERLAP, goals, settings
from tests.bench.hardware_page import page
from tests.bench.hardware_watch import CLEAN_WITHIN_BYTES, Look, clean_after, used_by_others
from tests.support.checkpoints import QWEN_7B

CLEAN = {"processes": [], "gpu_bytes": [0, 0], "gpu_unread": False, "shm": [], "gpus_clean_s": 0.0}


def attempt(rung: str, outcome: str, cause: str = "") -> dict[str, str]:
    return {"rung": rung, "outcome": outcome, "cause": cause}


def life(series: str, kind: str, ready_s: float | None, **more: Any) -> dict[str, Any]:
    told = {"name": f"{series}-{kind}", "series": series, "kind": kind, "fault": "", "counts": True, "limit_s": 300}
    told |= {"left": CLEAN, "ready_s": ready_s, "memory": {}, "utilisation": 0.9}
    if kind == ALONE:
        return {**told, "waited_s": ready_s or 300.0, "exit_status": None, **more}
    serving = {"attempts": [attempt("base", "ready")], "kills": [], "rung": "base", "first_verdict_s": None}
    return {**told, **serving, "journal": [], "screens": [], "exit_status": 0, "gave_up": False, **more}


def results(*lives: dict[str, Any], not_run: tuple[dict[str, str], ...] = (), model: str = "7b") -> dict[str, Any]:
    host = {"gpus": ["H100", "H100"], "gpu_bytes": [85e9, 85e9], "nvlink": True, "driver": "580.1", "cuda": "13.0"}
    host |= {
        "cpus": 32,
        "ram_bytes": 256e9,
        "vllm": "0.26.0",
        "torch": "2.11.0",
        "nccl": "2.28.9",
        "date": "2026-11-25 05:00",
    }
    return {
        "command": "python3 -m tests.bench.hardware healthy",
        "hardware": host,
        "model": {"name": model, "bytes": 15_231_274_984, "config": QWEN_7B},
        "arguments": ["--max-model-len", "4096"],
        "tensor_parallel": 2,
        "lives": list(lives),
        "notes": [],
        "not_run": list(not_run),
    }


def met(beginning: str, *lives: dict[str, Any]) -> bool | None:
    (one,) = settings({"a.json": results(*lives)})
    (found,) = [goal.met for goal in goals(one) if goal.goal.startswith(beginning)]
    return found


@pytest.mark.parametrize(("ours_s", "reached"), [(101.0, True), (103.0, False)])
def test_a_healthy_start_may_take_two_hundredths_longer_than_vllm_alone(ours_s: float, reached: bool) -> None:
    alone = [life("healthy", ALONE, seconds) for seconds in (90.0, 100.0, 200.0)]
    assert met("a healthy start", *alone, *[life("healthy", OVERLAP, ours_s)] * 3) is reached
    assert met("a healthy start", *alone, *[life("healthy", OVERLAP, ours_s)] * 2) is None, "too few for a median"


def test_the_page_says_how_the_checks_beside_healthy_starts_went() -> None:
    lines = ["  4.1 info preflight.passed attempt=1", "  9.0 info engine.ready attempt=1"]
    starts = [life("healthy", OVERLAP, 100.0, journal=lines) for _ in range(2)]
    assert "| 2 passed |" in page({"a.json": results(*starts)})


def test_a_warm_up_start_does_not_count() -> None:
    warm_ups = [life("healthy", OVERLAP, 300.0, counts=False)] * 3
    starts = [life("healthy", kind, 100.0) for kind in (ALONE, OVERLAP)] * 3
    assert met("a healthy start", *warm_ups, *starts) is True


def test_what_was_not_run_is_neither_met_nor_missed() -> None:
    (one,) = settings({"a.json": results()})
    assert {(goal.met, goal.measured) for goal in goals(one)} == {(None, "not run")}


@pytest.mark.parametrize(("ready_s", "reached"), [(119.0, True), (121.0, False), (None, False)])
def test_a_checked_hang_may_serve_twenty_seconds_later(ready_s: float | None, reached: bool) -> None:
    hang = life("p2p-hang", OVERLAP, ready_s, first_verdict_s=15.0)
    assert met("peer-to-peer broken", life("healthy", OVERLAP, 100.0), hang) is reached


@pytest.mark.parametrize(("failures", "reached"), [(1, True), (2, False)])
def test_an_unchecked_hang_may_cost_one_attempt_up_to_its_verdict(failures: int, reached: bool) -> None:
    attempts = [attempt("base", "stalled", "stalled-in-distributed-init")] * failures + [attempt("p2p-off", "ready")]
    hang = life("p2p-hang", OFF, 150.0, first_verdict_s=40.0, attempts=attempts)
    assert met("not checked", life("healthy", OVERLAP, 100.0), hang) is reached


def test_a_hang_that_was_cut_off_before_its_time_was_up_is_neither_met_nor_missed() -> None:
    healthy = life("healthy", OVERLAP, 100.0)
    for limit_s, reached in ((119, None), (120, False)):
        assert met("peer-to-peer broken", healthy, life("p2p-hang", OVERLAP, None, limit_s=limit_s)) is reached
    assert met("peer-to-peer broken", life("p2p-hang", OVERLAP, None)) is None, "with nothing to compare with"
    twice = [attempt("base", "stalled"), attempt("p2p-off", "stalled"), attempt("eager", "running")]
    cut = {"limit_s": 119, "first_verdict_s": 40.0}
    assert met("not checked", healthy, life("p2p-hang", OFF, None, **cut)) is None
    assert met("not checked", healthy, life("p2p-hang", OFF, None, **cut, attempts=twice)) is False, "two have failed"


def test_a_rehearsal_without_gpus_reaches_no_goal() -> None:
    rehearsed = results(life("healthy", OVERLAP, 100.0), life("healthy", ALONE, 100.0))
    rehearsed["hardware"] |= {"gpus": [], "gpu_bytes": []}
    made = page({"cpu.json": rehearsed})
    assert "vLLM alone (medians) | not run |" in made
    assert "a rehearsal on CPU" in made


def test_runs_on_the_same_grounds_are_compared_and_others_are_not() -> None:
    first, second = results(life("healthy", OVERLAP, 100.0)), results(life("p2p-hang", OVERLAP, 110.0))
    assert [len(one.lives) for one in settings({"a.json": first, "b.json": second})] == [2]
    for later, together in (("05:59", [2]), ("06:01", [1, 1])):
        second["hardware"]["date"] = f"2026-11-25 {later}"
        assert [len(one.lives) for one in settings({"b.json": second, "a.json": first})] == together
    other = results(life("p2p-hang", OVERLAP, 110.0), model="72b")
    assert [len(one.lives) for one in settings({"a.json": first, "b.json": other})] == [1, 1]


def test_a_hang_of_vllm_alone_shows_only_if_it_was_waited_for() -> None:
    assert met("vLLM alone", life("p2p-hang", ALONE, None, waited_s=300.2)) is True
    assert met("vLLM alone", life("p2p-hang", ALONE, None, waited_s=60.0)) is False


def test_what_a_life_leaves_is_told() -> None:
    left = {**CLEAN, "processes": ["77 VLLM::Worker_TP1"], "shm": ["psm_1"]}
    made = page({"a.json": results(life("healthy", OVERLAP, 100.0, left=left))})
    assert "| 77 VLLM::Worker_TP1, /dev/shm/psm_1 |" in made
    assert met("mgpud leaves nothing", life("healthy", OVERLAP, 100.0, left=left)) is False


def test_the_page_says_what_was_not_run_and_why() -> None:
    skipped = {"series": "healthy", "kind": ALONE, "fault": "", "why": "12 s were left"}
    made = page({"a.json": results(life("healthy", OVERLAP, 100.0), not_run=(skipped,))})
    assert "- a.json: healthy vLLM alone: 12 s were left" in made
    assert "- seed: in none of the files" in made


def test_the_page_has_the_seed_s_transcript_and_screens() -> None:
    screen = {"at_s": 31.0, "command": "mgpuctl status", "text": "starting | 12 %\n"}
    seed = life("seed", OVERLAP, 110.0, journal=["    0.5 info engine.starting attempt=1"], screens=[screen])
    made = page({"a.json": results(seed)})
    assert "engine.starting attempt=1" in made
    assert "`mgpuctl status` after 31 s:\n\n```\nstarting | 12 %\n```" in made


def test_weights_and_tokens_that_vllm_told_are_put_beside_those_foreseen() -> None:
    memory = {"weights_gib": [7.13, 7.13], "total_gib": [79.18], "kv_tokens": [1_000.0]}
    healthy = life("healthy", OVERLAP, 100.0, memory=memory)
    assert met("weights as foreseen", healthy) is True
    assert met("KV tokens as foreseen", healthy) is False


def looks(*rows: tuple[float, set[int], tuple[int, ...]]) -> list[Look]:
    return [Look(at=at, pids=frozenset(pids), held=held) for at, pids, held in rows]


def test_cleaning_counts_from_the_last_look_at_a_whole_engine() -> None:
    seen = looks((9.0, {1, 2}, (5 << 30,)), (10.1, {1, 2}, (5 << 30,)), (10.3, {2}, (5 << 30,)), (10.6, set(), (0,)))
    assert clean_after(seen, 10.0, watching_gpus=True) == pytest.approx(0.5)


def test_gpus_that_still_hold_memory_or_do_not_answer_are_not_clean() -> None:
    dirty = looks((9.0, {1}, (5 << 30,)), (10.1, set(), (CLEAN_WITHIN_BYTES + 1,)), (10.2, set(), ()))
    assert clean_after(dirty, 10.0, watching_gpus=True) is None
    assert clean_after(dirty, 10.0, watching_gpus=False) == pytest.approx(0.1)


def test_shared_memory_that_somebody_else_uses_is_not_left_behind() -> None:
    memory = SharedMemory(create=True, size=1)
    try:
        names = frozenset({memory.name.lstrip("/"), "nobody_s"})
        assert used_by_others(names, ours=()) == names - {"nobody_s"}
        assert used_by_others(names, ours=(os.getpid(),)) == frozenset()
    finally:
        memory.close()
        memory.unlink()
