from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu_llm.core.known_good import Beginning, KnownGood, begin, changes, from_json, served, to_json
from mgpu_llm.core.ladder import BASE, Ladder
from mgpu_llm.core.remedies import BY_DEFAULT, Area
from tests.core.world import MIDNIGHT_S, P2P_OFF, policy

LADDER = policy().ladder
KEY = {"model": "/m", "driver": "550.54.14", "vLLM": "0.26.0", "NCCL": ""}
KNOWN = KnownGood(
    rung="p2p-off+utilisation-0.85", since="2026-11-24T21:05:00Z", cause="nccl-p2p", key=KEY, starts=3, boot="b1"
)
DEEP = LADDER.rung(KNOWN.rung)


def test_where_nothing_is_known_a_start_begins_on_the_base() -> None:
    assert begin(None, LADDER, boot="b1", up_after=10) == Beginning(rung=BASE, known=None)


def test_a_start_begins_where_the_last_one_served_and_counts() -> None:
    beginning = begin(KNOWN, LADDER, boot="b1", up_after=10)
    assert beginning == Beginning(rung=DEEP, known=replace(KNOWN, starts=4))


@pytest.mark.parametrize(
    ("starts", "boot", "up_after", "trial"),
    [
        (8, "b1", 10, False),
        (9, "b1", 10, True),
        (50, "b1", 10, True),
        (0, "b1", 1, True),
        (0, "b2", 10, True),
        (0, "", 10, False),
        (50, "b2", 0, False),
    ],
)
def test_after_so_many_starts_or_a_reboot_one_rung_up_is_tried_once(
    starts: int, boot: str, up_after: int, trial: bool
) -> None:
    beginning = begin(replace(KNOWN, starts=starts), LADDER, boot=boot, up_after=up_after)
    assert beginning.trial is trial
    assert beginning.rung == (P2P_OFF if trial else DEEP)
    if trial:
        assert beginning.known == replace(KNOWN, starts=0, boot=boot)
        again = begin(beginning.known, LADDER, boot=boot, up_after=max(up_after, 2))
        assert (again.rung, again.trial) == (DEEP, False), "not again at the very next start"


@pytest.mark.parametrize(
    "ladder", [Ladder(base=LADDER.base, areas=BY_DEFAULT - {Area.TRANSPORTS}), replace(LADDER, own=())]
)
def test_a_rung_that_may_not_be_taken_any_more_is_forgotten(ladder: Ladder) -> None:
    assert begin(KNOWN, ladder, boot="b1", up_after=10) == Beginning(rung=BASE, known=None)


def remembered(known: KnownGood | None, name: str, cause: str = "") -> KnownGood | None:
    return served(known, LADDER.rung(name), causes=(cause,), key=KEY, utc_s=MIDNIGHT_S, boot="b2")


def test_what_serves_is_remembered_with_its_first_day_and_its_cause() -> None:
    first = remembered(None, "p2p-off", "nccl-p2p")
    assert first == KnownGood(rung="p2p-off", since="2026-11-24T00:00:00Z", cause="nccl-p2p", key=KEY, boot="b2")


def test_of_the_base_nothing_is_remembered() -> None:
    assert remembered(KNOWN, "base") is None


def test_a_rung_that_serves_again_keeps_its_day_its_cause_and_its_count() -> None:
    again = remembered(replace(KNOWN, key={"NCCL": "2.28.9", "driver": "1"}), KNOWN.rung, "another")
    assert again == replace(KNOWN, key={**KEY, "NCCL": "2.28.9"}), "what nobody can tell today is still what it was"


def test_another_rung_has_a_day_of_its_own_and_the_cause_that_led_to_it_if_any_did() -> None:
    stepped = remembered(KNOWN, "p2p-off+utilisation-0.80", "cuda-out-of-memory")
    assert stepped is not None
    assert (stepped.since, stepped.cause, stepped.starts) == ("2026-11-24T00:00:00Z", "nccl-p2p, cuda-out-of-memory", 0)
    back = remembered(KNOWN, "p2p-off")
    assert back is not None
    assert (back.rung, back.cause) == ("p2p-off", "nccl-p2p")


def test_what_has_changed_is_told_part_by_part_and_what_nobody_can_tell_today_has_not() -> None:
    now = {"model": "/m", "driver": "555.42", "vLLM": "", "NCCL": "2.28.9", "GPUs": "GPU-a"}
    assert changes(KNOWN, KEY) == ()
    assert changes(KNOWN, now) == ("driver 550.54.14 -> 555.42",)
    long = changes(KNOWN, {"model": "/" + "m" * 300})
    assert len(long[0]) < 80


def test_it_comes_back_from_its_file() -> None:
    assert from_json(to_json(KNOWN)) == KNOWN


WHOLE = json.loads(to_json(KNOWN))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[]", "it is not of format 1"),
        (json.dumps({**WHOLE, "format": 2}), "it is not of format 1"),
        (json.dumps({**WHOLE, "rung": 5}), 'it has no text "rung"'),
        (json.dumps({**WHOLE, "rung": "a\nb"}), 'it has no text "rung"'),
        (json.dumps({**WHOLE, "since": "x" * 3000}), 'it has no text "since"'),
        (json.dumps({**WHOLE, "key": []}), 'it has no texts "key"'),
        (json.dumps({**WHOLE, "key": {"a": 1}}), 'it has no texts "key"'),
        (json.dumps({**WHOLE, "starts": True}), 'it has no number "starts"'),
        (json.dumps({**WHOLE, "starts": -1}), 'it has no number "starts"'),
        (json.dumps({**WHOLE, "starts": "1"}), 'it has no number "starts"'),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        from_json(text)
    assert "\n" not in str(refused.value)
