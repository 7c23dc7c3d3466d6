"""The daemon on a simulated NVIDIA driver of which a GPU fails: what goes on serving, what goes on without it, what gives up."""

from __future__ import annotations

from typing import Any, Final

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, causes, fact, remains
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid

TWO: Final = {"gpus.use": [3, 2], "gpus.tensor_parallel": None}
SOUND: Final = FakeGpu()
LOST: Final = FakeGpu(lost=True)
TO_DRAIN: Final = FakeGpu(recovery=4)
TO_RESET: Final = FakeGpu(recovery=1)


def serves(life: Life, attempt: int) -> dict[str, Any]:
    return life.wait_for(lambda status: (status["state"], status["attempt"]) == ("ready", attempt), LIMIT_S)


def test_a_gpu_that_is_to_be_drained_serves_on_and_one_that_is_lost_is_left_out_at_once(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND, SOUND, TO_DRAIN, SOUND])
    life = begin(settings={**TWO, "gpus.spares": [1]}, environ=nvml.environment())
    life.wait_log("gpu.fault")
    status = serves(life, 1)
    assert (status["rung"], len(status["gpu_faults"])) == ("base", 1)
    (told,) = life.told("gpu.fault")
    assert "GPU 2: the driver asks for a recovery: drain-and-reset" in told

    nvml.set([SOUND, SOUND, LOST, SOUND])  # the fake engine minds it as little as one that hangs: it answers its probes
    status = serves(life, 2)
    assert causes(status) == [("base", "died", "gpu-lost")]
    assert (status["rung"], status["degraded"], status["gpu_faults"]) == ("gpus-3,1", True, [])
    assert [gpu["uuid"] for gpu in status["gpus"]] == [uuid(3), uuid(1)]
    (death,) = life.told("engine.died")
    assert fact(death, "summary").startswith("GPU 2 is lost: ")
    assert fact(death, "next") == "step to rung gpus-3,1"
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_one_that_must_be_reset_ends_a_load_and_where_nothing_is_left_the_daemon_gives_up_with_what_to_do(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([SOUND] * 4)
    hangs = {"patience.distributed_init": 600}
    life = begin("hang-init unless tp<=1", {**TWO, **hangs}, nvml.environment())
    alone = begin("hang-init", {**hangs, "gpus.use": [2], "gpus.tensor_parallel": None}, nvml.environment())
    for one in (life, alone):
        one.wait_for(lambda status: status["phase"] == "distributed-init", LIMIT_S)
    nvml.set([SOUND, SOUND, TO_RESET, SOUND])
    assert alone.ended() == 69
    assert len(alone.told("engine.starting")) == 1
    last = alone.events()[-1]
    assert "GPU 2 needs a reset" in last
    assert "nvidia-smi --gpu-reset" in last
    status = serves(life, 2)
    assert causes(status) == [("base", "crashed", "gpu-needs-reset")]
    assert (status["rung"], [gpu["uuid"] for gpu in status["gpus"]]) == ("tp-1", [uuid(3)])
    assert life.stop() == 0
    for one in (life, alone):
        assert remains(one.setup) == []
