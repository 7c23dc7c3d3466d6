"""The daemon checks its GPUs before an engine comes to them: a simulated driver, and a stand-in for PyTorch."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, causes, fact, living, remains, until
from tests.support.daemons import processes_of
from tests.support.fake_nvml import FakeGpu, FakeNvml

FAKE_TORCH: Final = Path(__file__).parents[1] / "support/fake_torch"
GPUS: Final = {"gpus.use": [0, 1], "gpus.tensor_parallel": None}
CURED: Final = {"unless": {"NCCL_P2P_DISABLE": "1"}}
NO_PEERS: Final = {
    "at": "all_reduce",
    "do": "raise",
    "kind": "DistBackendError",
    "text": "NCCL error: unhandled cuda error",
    **CURED,
}


def settings(*faults: Mapping[str, object], mode: str = "overlap") -> dict[str, Any]:
    return {
        **GPUS,
        "preflight.mode": mode,
        "engine.env.PYTHONPATH": str(FAKE_TORCH),
        "engine.env.FAKE_TORCH": json.dumps(faults),
    }


def told(life: Life, *events: str) -> list[str]:
    """Those of the daemon's events that were told, in order."""
    return [name for line in life.events() if (name := line.split()[0]) in events]


def test_a_transport_that_fails_sends_the_engine_to_one_that_works_and_the_next_start_knows(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 2)
    life = begin("hang-boot unless NCCL_P2P_DISABLE=1", settings(NO_PEERS), nvml.environment())
    status = life.ready()
    assert causes(status) == [("base", "averted", "transport-broken")]
    assert (status["rung"], status["attempt"]) == ("p2p-off", 2)
    assert "p2p-off works" in status["attempts"][0]["summary"]
    assert told(life, "engine.averted", "preflight.passed", "engine.ready") == [
        "engine.averted",
        "preflight.passed",
        "engine.ready",
    ]
    assert life.stop() == 0
    assert remains(life.setup) == []
    with living(life.setup, nvml.environment(), log="again") as again:
        assert (again.ready()["rung"], again.status()["attempt"]) == ("p2p-off", 1)
        assert "passed in an earlier start" in fact(again.told("preflight.passed")[0], "found")
        assert again.stop() == 0


def test_before_the_load_the_check_comes_first_and_without_pytorch_the_load_begins_all_the_same(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 2)
    checked = begin("", settings(mode="before"), nvml.environment())
    blind = begin("", {**settings(mode="before"), "engine.env.PYTHONPATH": "/nowhere"}, nvml.environment())
    off = begin("", settings(NO_PEERS, mode="off"), nvml.environment())
    for life, first in ((checked, "preflight.passed"), (blind, "preflight.unobserved")):
        assert life.ready()["rung"] == "base"
        assert told(life, "engine.starting", first, "engine.command") == ["engine.starting", first, "engine.command"]
    assert "torch" in fact(blind.told("preflight.unobserved")[0], "why")
    assert off.ready()["rung"] == "base"
    assert not [line for line in off.events() if line.startswith("preflight")]
    for life in (checked, blind, off):
        assert life.stop() == 0
        assert remains(life.setup) == []


def test_a_check_that_hangs_ends_with_a_stop_and_with_the_daemons_death(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    hangs = settings({"at": "context", "do": "hang"}, mode="before")
    stopped, killed = begin("", hangs, nvml.environment()), begin("", hangs, nvml.environment())
    for life in (stopped, killed):
        life.wait_until("checking", LIMIT_S)
        until("the ranks are there", lambda life=life: len(processes_of(life.setup.runtime_dir)) >= 3, life.log)  # type: ignore[misc]
    assert stopped.stop() == 0
    assert remains(stopped.setup) == []
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    until("nothing of the check is left", lambda: processes_of(killed.setup.runtime_dir) == [], killed.log)


def test_a_check_that_is_slow_to_end_holds_up_nothing_but_the_next_check(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    life = begin("", settings({"at": "context", "do": "hang"}, mode="before"), nvml.environment())
    runtime_dir = life.setup.runtime_dir
    until("the ranks are there", lambda: len(processes_of(runtime_dir)) >= 3, life.log)
    old = {int(process.split()[0]) for process in processes_of(runtime_dir)}
    os.kill(min(old), signal.SIGSTOP)  # the probe, which would end its ranks
    assert life.ctl("restart").returncode == 0
    life.wait_for(lambda status: status["attempt"] == 2, LIMIT_S)
    assert min(old) in {int(process.split()[0]) for process in processes_of(runtime_dir)}
    until(
        "there is another", lambda: any(int(each.split()[0]) not in old for each in processes_of(runtime_dir)), life.log
    )
    assert not old & {int(process.split()[0]) for process in processes_of(runtime_dir)}
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_check_that_is_not_done_when_the_engine_comes_to_its_gpus_gives_way(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 2)
    life = begin("", settings({"at": "context", "do": "hang"}), nvml.environment())
    assert life.ready()["rung"] == "base"
    assert told(life, "preflight.unfinished", "engine.ready") == ["preflight.unfinished", "engine.ready"]
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_a_gpu_that_takes_one_process_only_is_checked_before_the_load(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu(compute_mode=3)])
    life = begin("", settings(), nvml.environment())
    assert life.ready()["rung"] == "base"
    assert told(life, "preflight.passed", "engine.command") == ["preflight.passed", "engine.command"]
    assert life.stop() == 0
