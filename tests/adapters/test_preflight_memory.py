"""What has passed a preflight is not tried again, until something changes that it depends on."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from structlog.typing import EventDict

from mgpu_llm.adapters.memory.preflight import MOST, PassedPreflights
from mgpu_llm.adapters.preflight import Patience
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked
from tests.adapters.test_preflight import HANGS, NO_P2P, QUICK, TRANSPORTS, environment, gpus, preflight, works

KEY = {"boot": "b" * 36, "driver": "550.54"}
#: Whatever is really run here says so: it does not get through the import.
BROKEN = {"at": "import", "do": "raise", "kind": "ImportError", "text": "it was really run"}


def passed_once(memory: PassedPreflights, count: int = 2) -> Checked:
    checked = asyncio.run(preflight(memory=memory, key=KEY).check(gpus(count), environment(), TRANSPORTS))
    assert checked.unobserved == ""
    return checked


def test_a_pass_is_remembered_with_its_speed_by_the_next_daemon_too(tmp_path: Path, logged: list[EventDict]) -> None:
    memory = PassedPreflights(tmp_path)
    first = passed_once(memory)
    memory.close()
    assert [path.name for path in tmp_path.iterdir()] == ["preflight.json"]
    again = PassedPreflights(tmp_path)
    checked = asyncio.run(preflight(memory=again, key=KEY).check(gpus(2), environment(BROKEN), TRANSPORTS))
    (own,) = checked.transports
    assert (own.name, own.works, own.gib_per_s) == (AS_LAUNCHED, True, first.transports[0].gib_per_s)
    assert (checked.remembered, checked.unobserved) == (True, "")
    assert logged == []


def test_one_gpu_that_passed_is_remembered_without_a_transport() -> None:
    memory = PassedPreflights(None)
    passed_once(memory, count=1)
    checked = asyncio.run(preflight(memory=memory, key=KEY).check(gpus(1), environment(BROKEN), TRANSPORTS))
    assert (checked.transports, checked.remembered) == ((), True)


@pytest.mark.parametrize(
    ("key", "uuids", "more"),
    [
        ({**KEY, "driver": "560.28"}, ("GPU-0", "GPU-1"), {}),
        (KEY, ("GPU-0", "GPU-2"), {}),
        (KEY, ("GPU-0", "GPU-1"), {"NCCL_ALGO": "Tree"}),
        (KEY, ("GPU-0", "GPU-1"), {"VLLM_NCCL_SO_PATH": "/opt/libnccl.so.2"}),
    ],
    ids=["driver", "gpu", "nccl", "library"],
)
def test_a_pass_is_forgotten_once_something_changes_that_it_depends_on(
    key: dict[str, str], uuids: tuple[str, str], more: dict[str, str]
) -> None:
    memory = PassedPreflights(None)
    passed_once(memory)
    checking = preflight(memory=memory, key=key)
    checked = asyncio.run(checking.check(dict(zip("01", uuids, strict=True)), environment(BROKEN, **more), TRANSPORTS))
    assert (checked.remembered, checked.unobserved) == (False, "cannot import torch: it was really run")


def test_what_changes_with_every_start_does_not_make_a_pass_forgotten() -> None:
    memory = PassedPreflights(None)
    passed_once(memory)
    more = {"VLLM_RPC_BASE_PATH": "/run/x", "MGPU_LLM_ENGINE": "mark", "NCCL_DEBUG": "INFO"}
    checked = asyncio.run(preflight(memory=memory, key=KEY).check(gpus(2), environment(**more), TRANSPORTS))
    assert checked.remembered


def test_an_alternative_that_passed_is_remembered_for_the_launch_that_takes_it_and_what_failed_is_tried_again() -> None:
    memory = PassedPreflights(None)
    checking = preflight(memory=memory, key=KEY, patience=QUICK)
    hangs = environment({**HANGS, "unless": NO_P2P})
    assert works(asyncio.run(checking.check(gpus(2), hangs, TRANSPORTS)))[AS_LAUNCHED] is False
    taken = asyncio.run(checking.check(gpus(2), environment(BROKEN, **NO_P2P), TRANSPORTS))
    assert (works(taken), taken.remembered) == ({AS_LAUNCHED: True}, True)
    again = asyncio.run(checking.check(gpus(2), environment(BROKEN), TRANSPORTS))
    assert again.unobserved == "cannot import torch: it was really run"


def test_gpus_between_which_copies_arrive_wrong_have_not_passed() -> None:
    memory = PassedPreflights(None)
    wrong = environment({"at": "copy", "do": "wrong", "gpu": 0})
    checking = preflight(memory=memory, key=KEY)
    for _ in range(2):
        checked = asyncio.run(checking.check(gpus(2), wrong, TRANSPORTS))
        assert (set(checked.pairs), checked.remembered) == ({("0", "1")}, False)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format": 1, "pas', "it is not JSON: "),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"format": 2, "passed": []}', "it is not of format 1"),
        ('{"format": 1, "passed": {}}', 'it has no list "passed"'),
        ('{"format": 1, "passed": [{"gib_per_s": 1}]}', 'a pass has no "key"'),
        ('{"format": 1, "passed": [{"key": "a", "gib_per_s": NaN}]}', 'a pass has no number "gib_per_s"'),
        ('{"format": 1, "passed": [{"key": "a", "gib_per_s": 1%s}]}' % ("0" * 400), 'a pass has no number "gib_per_s"'),
    ],
    ids=["cut", "deep", "of-the-future", "no-list", "no-key", "no-number", "huge"],
)
def test_a_file_that_is_none_of_ours_is_moved_aside_with_one_warning_and_nothing_has_passed(
    tmp_path: Path, logged: list[EventDict], text: str, why: str
) -> None:
    (tmp_path / "preflight.json").write_text(text)
    memory = PassedPreflights(tmp_path)
    assert not memory.passed("a")
    memory.remember("a", 25.5)
    memory.close()
    assert PassedPreflights(tmp_path).gib_per_s("a") == 25.5
    (warning,) = logged
    assert warning["event"] == "state.broken"
    assert why in warning["reason"]
    assert (tmp_path / "preflight.json.broken").read_text() == text


def test_of_many_passes_the_newest_are_kept(tmp_path: Path) -> None:
    memory = PassedPreflights(tmp_path)
    for number in range(MOST + 5):
        memory.remember(f"key {number}", None)
    memory.remember("key 5", 1.0)
    memory.remember("the newest", 2.0)
    memory.close()
    rows = json.loads((tmp_path / "preflight.json").read_text())["passed"]
    assert len(rows) == MOST
    assert [row["key"] for row in rows[-2:]] == ["key 5", "the newest"]
    assert not PassedPreflights(tmp_path).passed("key 6")


def test_what_is_forgotten_leaves_no_file(tmp_path: Path) -> None:
    memory = PassedPreflights(tmp_path)
    memory.remember("a", None)
    memory.forget()
    memory.close()
    assert list(tmp_path.iterdir()) == []
    assert not memory.passed("a")


@pytest.mark.gpu
def test_the_real_gpus_of_this_host_pass(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    count = torch.cuda.device_count()
    if not count:
        pytest.skip("there is no GPU")
    memory = PassedPreflights(tmp_path)
    checking = preflight(memory=memory, python=(sys.executable,), patience=Patience())
    checked = asyncio.run(checking.check(gpus(count), {**os.environ}, TRANSPORTS))
    assert (checked.gpus, checked.pairs, checked.unobserved) == ({}, {}, "")
    assert works(checked) == ({AS_LAUNCHED: True} if count > 1 else {})
