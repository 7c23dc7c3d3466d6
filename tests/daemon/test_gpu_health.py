"""The daemon on a simulated NVIDIA driver of which a GPU fails: what goes on serving, what goes on without it, what gives up."""

from __future__ import annotations

from typing import Final

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, causes, fact, remains
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid

FOUR: Final = {"gpus.use": "all", "gpus.tensor_parallel": None}
SOUND: Final = FakeGpu()
LOST: Final = FakeGpu(lost=True)
TO_DRAIN: Final = FakeGpu(recovery=4)
TO_RESET: Final = FakeGpu(recovery=1)


def serves(life: Life, attempt: int) -> dict[str, object]:
    return life.wait_for(lambda status: (status["state"], status["attempt"]) == ("ready", attempt), LIMIT_S)


def test_a_gpu_that_is_to_be_drained_serves_on_and_one_that_is_lost_is_left_out_at_once(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND] * 4)
    life = begin(settings=FOUR, environ=nvml.environment())
    assert serves(life, 1)["rung"] == "base"
    nvml.set([SOUND, SOUND, SOUND, TO_DRAIN])
    life.wait_log("gpu.fault")
    (told,) = life.told("gpu.fault")
    assert fact(told, "what") == r"GPU 3: the driver asks for the recovery action \"drain-and-reset\""
    status = life.status()
    assert (status["state"], status["attempt"], len(status["gpu_faults"])) == ("ready", 1, 1)

    nvml.set([SOUND, SOUND, SOUND, LOST])  # the engine hangs, if anything: it goes on to answer
    status = serves(life, 2)
    assert causes(status) == [("base", "died", "gpu-lost")]
    assert (status["rung"], status["degraded"], status["gpu_faults"]) == ("tp-2", True, [])
    assert [gpu["uuid"] for gpu in status["gpus"]] == [uuid(0), uuid(1)]
    (death,) = life.told("engine.died")
    assert fact(death, "summary").startswith("GPU 3 is lost: ")
    assert fact(death, "next") == "step to rung tp-2"
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_one_that_must_be_reset_ends_a_load_and_where_nothing_is_left_the_daemon_gives_up_with_what_to_do(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND] * 4)
    hangs = {"patience.distributed_init": 600}
    life = begin("hang-init unless tp<=2", {**FOUR, **hangs}, nvml.environment())
    alone = begin("hang-init", {"gpus.use": [3], "gpus.tensor_parallel": None, **hangs}, nvml.environment())
    for one in (life, alone):
        one.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)
    nvml.set([SOUND, SOUND, SOUND, TO_RESET])
    assert alone.ended() == 69
    assert len(alone.told("engine.starting")) == 1
    assert "GPU 3 needs a reset" in alone.log()
    assert "nvidia-smi --gpu-reset" in alone.log()
    status = serves(life, 2)
    assert causes(status) == [("base", "crashed", "gpu-needs-reset")]
    assert status["rung"] == "tp-2"
    assert life.stop() == 0
    for one in (life, alone):
        assert remains(one.setup) == []
