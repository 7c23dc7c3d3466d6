"""What the chronicle still holds to be true when a life begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mgpu_llm.adapters.memory.history import History
from mgpu_llm.adapters.memory.known_good import KnownGoodRung
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.chronicle import Chronicle
from mgpu_llm.core.known_good import KnownGood, to_json
from mgpu_llm.core.ladder import Ladder
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Area
from mgpu_llm.core.states import Policy

LADDER = Ladder(base=Launch(gpus=None, tensor_parallel=2, utilisation=None), sizes=(1,))
KEY = {"driver": "550.54", "config": "0123456789abcdef"}


def begun(
    folder: Path, *, rung: str = "p2p-off", key: Mapping[str, str] = KEY, ladder: Ladder = LADDER
) -> tuple[KnownGood | None, list[dict[str, object]]]:
    """What a life knows whose predecessor served on `rung` under KEY, and what it logs of that."""
    known = KnownGood(rung=rung, since="2026-11-24T21:05:00Z", cause="p2p-stall", key=KEY)
    (folder / "known-good.json").write_text(to_json(known))
    chronicle = Chronicle(Recorder(None, keep=0, max_bytes=0), History(None), KnownGoodRung(folder), "toy")
    with capture_logs() as logs:
        chronicle.forget_outdated(Policy(ladder=ladder, key=key))
    chronicle.close()
    assert (folder / "known-good.json").exists() == (chronicle.known is not None)
    return chronicle.known, [dict(line) for line in logs]


def forgotten(**why: str) -> list[dict[str, object]]:
    facts = {"rung": "p2p-off", "since": "2026-11-24T21:05:00Z", **why}
    return [{"event": "rung.forgotten", "log_level": "info", **facts}]


def test_a_rung_is_known_as_long_as_nothing_has_changed(tmp_path: Path) -> None:
    known, logs = begun(tmp_path)
    assert known is not None
    assert (known.rung, logs) == ("p2p-off", [])


def test_a_part_that_nobody_can_tell_today_has_not_changed(tmp_path: Path) -> None:
    known, logs = begun(tmp_path, key={**KEY, "driver": ""})
    assert known is not None
    assert logs == []


def test_a_new_driver_makes_the_rung_forgotten(tmp_path: Path) -> None:
    known, logs = begun(tmp_path, key={**KEY, "driver": "555.42"})
    assert known is None
    assert logs == forgotten(changed="driver 550.54 -> 555.42")


@pytest.mark.parametrize(
    ("rung", "ladder", "why"),
    [
        ("p2p-off", Ladder(base=LADDER.base, areas=BY_DEFAULT - {Area.TRANSPORTS}), "must not be changed: transports"),
        ("tp-1", Ladder(base=LADDER.base), 'there is no rung "tp-1"'),
        ("of-another-version", LADDER, 'there is no rung "of-another-version"'),
    ],
    ids=["forbidden", "not-there", "unknown"],
)
def test_a_rung_that_the_ladder_does_not_give_is_forgotten(tmp_path: Path, rung: str, ladder: Ladder, why: str) -> None:
    known, (line,) = begun(tmp_path, rung=rung, ladder=ladder)
    assert known is None
    assert line["event"] == "rung.forgotten"
    assert str(line["why"]).endswith(why)


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    chronicle = Chronicle(Recorder(None, keep=0, max_bytes=0), History(None), KnownGoodRung(tmp_path), "toy")
    with capture_logs() as logs:
        chronicle.forget_outdated(Policy(ladder=LADDER, key=KEY))
    chronicle.close()
    assert (chronicle.known, logs) == (None, [])
