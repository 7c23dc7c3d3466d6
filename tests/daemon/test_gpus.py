"""The daemon on a simulated NVIDIA driver: which GPUs the engine gets, and what their memory and silence mean."""

from __future__ import annotations

import os
import re
import signal

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S, Life, argv_of, causes, environ_of, fact, option, remains, until
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import uuid

GPUS = {"gpus.use": [3, 2], "gpus.tensor_parallel": None}
#: By a process that lives: else the GPU would be out.
HELD = FakeGpu(used_bytes=5_000_000_000, processes=((os.getpid(), 5_000_000_000),))


def in_attempt(life: Life, attempt: int, phase: str) -> None:
    life.wait_for(lambda status: status["attempt"] == attempt and status["phase"] == phase, LIMIT_S)


def visible(life: Life) -> tuple[str, str, str, str]:
    """What the engine got: device order, devices, tensor parallel size, utilisation."""
    pid = life.status()["pid"]
    environ, argv = environ_of(pid), argv_of(pid)
    size, utilisation = option(argv, "--tensor-parallel-size"), option(argv, "--gpu-memory-utilization")
    return environ["CUDA_DEVICE_ORDER"], environ["CUDA_VISIBLE_DEVICES"], size, utilisation


def test_the_engine_gets_indices_in_the_configs_order_and_fewer_gpus_on_a_lower_rung(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4)
    misleading = {**nvml.environment(), "CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    settings = {**GPUS, "patience.distributed_init": 2}
    life = begin("hang-init unless tp<=1", settings, misleading)
    named = begin(settings={"gpus.use": [uuid(2), uuid(0)]}, environ=nvml.environment())
    every = begin(settings={"gpus.use": "all", "gpus.memory_utilisation": 0.42}, environ=nvml.environment())
    in_attempt(life, 1, "distributed-init")
    assert visible(life) == ("PCI_BUS_ID", "3,2", "2", "0.9")
    in_attempt(life, 2, "distributed-init")
    assert visible(life) == ("PCI_BUS_ID", "3,2", "2", "0.9")
    assert named.ready()["rung"] == "base"
    assert visible(named) == ("PCI_BUS_ID", "2,0", "2", "0.9")
    assert every.ready()["rung"] == "base"
    assert visible(every) == ("PCI_BUS_ID", "0,1,2,3", "2", "0.42")
    status = life.ready()
    # A stall before any memory was taken is not cured by taking less.
    assert [cause[0] for cause in causes(status)] == ["base", "p2p-off", "p2p-off+loopback"]
    assert (status["rung"], visible(life)) == ("p2p-off+loopback+tp-1", ("PCI_BUS_ID", "3", "1", "0.9"))
    assert status["changes"][-2:] == ["GPUs 3,2 -> 3", "--tensor-parallel-size 2 -> 1"]
    assert [gpu["uuid"] for gpu in status["gpus"]] == [uuid(3)]
    for one in (life, named, every):
        assert one.stop() == 0
        assert remains(one.setup) == []


def test_out_of_memory_goes_straight_to_lower_utilisation_and_a_gpu_that_is_taken_is_waited_for_first(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4)
    full = begin("oom unless utilisation<=0.8", GPUS, nvml.environment())
    taken = begin("gpu-not-free unless utilisation<=0.85", GPUS, nvml.environment())
    freed = begin("gpu-not-free unless attempt>=2", GPUS, nvml.environment())
    status = full.ready()
    assert causes(status) == [
        ("base", "crashed", "cuda-out-of-memory"),
        ("utilisation-0.85", "crashed", "cuda-out-of-memory"),
    ]
    assert (status["rung"], visible(full)[3]) == ("utilisation-0.80", "0.8")
    status = taken.ready()
    assert causes(status) == [("base", "crashed", "gpu-not-free")] * 3
    assert "107.83 of 139.8 GiB" in status["attempts"][0]["summary"]
    # At once to what vLLM says is free.
    assert (status["rung"], visible(taken)[3]) == ("utilisation-0.75", "0.75")
    assert [float(fact(line, "retry_in_s")) for line in taken.told("engine.waiting")] == [0.2, 0.4]
    status = freed.ready()
    assert (causes(status), status["rung"]) == ([("base", "crashed", "gpu-not-free")], "base")
    for one in (full, taken, freed):
        assert one.stop() == 0
        assert remains(one.setup) == []


def test_memory_that_a_killed_engine_held_is_waited_for_before_the_next_attempt(begin: Begin, nvml: FakeNvml) -> None:
    nvml.set([FakeGpu()] * 4)
    settings = {**GPUS, "patience.distributed_init": 600, "stop.kill_deadline": 600}
    life = begin("hang-init", settings, nvml.environment())
    in_attempt(life, 1, "distributed-init")
    nvml.set([FakeGpu(), FakeGpu(), HELD, FakeGpu()])
    assert life.ctl("restart").returncode == 0
    life.wait_until("killing", LIMIT_S)
    asked = len(nvml.calls())
    until("the GPUs are asked several times", lambda: len(nvml.calls()) > asked + 50)
    assert life.status()["state"] == "killing"
    nvml.set([FakeGpu()] * 4)
    in_attempt(life, 2, "distributed-init")
    assert life.told("engine.left") == []
    assert life.stop() == 0
    assert remains(life.setup) == []


def test_memory_that_stays_is_said_after_the_deadline_and_a_signal_meanwhile_is_kept(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4)
    settings = {**GPUS, "patience.distributed_init": 600, "stop.kill_deadline": 3}
    goes_on = begin("hang-init", settings, nvml.environment())
    ended = begin("hang-init", settings, nvml.environment())
    for life in (goes_on, ended):
        in_attempt(life, 1, "distributed-init")
    nvml.set([FakeGpu(), FakeGpu(), FakeGpu(), HELD])
    assert ended.ctl("restart").returncode == 0
    ended.wait_until("killing", LIMIT_S)
    ended.process.send_signal(signal.SIGINT)
    assert goes_on.ctl("restart").returncode == 0
    in_attempt(goes_on, 2, "distributed-init")
    assert ended.ended() == 0
    assert ended.story().count("engine.starting") == 1
    said = f"GPU 3 still holds 5.00 GB more than before the attempt: pid {os.getpid()} (user "
    (told,) = ended.told("engine.left")
    assert fact(told, "what").startswith(said)
    # What the second attempt found there is not held against it.
    assert goes_on.stop() == 0
    (told,) = goes_on.told("engine.left")
    assert fact(told, "what").startswith(said)
    assert remains(goes_on.setup) == remains(ended.setup) == []


def test_a_driver_that_falls_silent_in_mid_load_is_said_once_and_triples_the_patience(
    begin: Begin, nvml: FakeNvml
) -> None:
    nvml.set([FakeGpu()] * 4)
    life = begin("hang-init", {**GPUS, "patience.distributed_init": 100, "stop.kill_deadline": 5}, nvml.environment())
    in_attempt(life, 1, "distributed-init")
    assert life.status()["patience_s"] == 100
    nvml.set([FakeGpu()] * 4, ["nvmlDeviceGetMemoryInfo block"])
    status = life.wait_for(lambda status: bool(status["gpus_unobserved"]), LIMIT_S)
    assert status["patience_s"] == 300
    assert "has not answered for" in status["gpus_unobserved"]
    # Every question of ours is still answered, and the processes are still watched.
    quiet_s = status["quiet_s"]
    life.wait_for(lambda status: status["quiet_s"] > quiet_s + 2, LIMIT_S)
    assert life.ctl("status").returncode == 1
    (said,) = life.told("gpus.unobserved")
    assert "patience is three times as long" in fact(said, "consequence")
    # The driver comes back, and what it says counts again.
    nvml.set([FakeGpu()] * 4)
    life.wait_for(lambda status: not status["gpus_unobserved"] and status["patience_s"] == 100, LIMIT_S)
    nvml.set([FakeGpu()] * 4, ["nvmlDeviceGetMemoryInfo block"])
    life.wait_for(lambda status: bool(status["gpus_unobserved"]), LIMIT_S)
    assert life.stop() == 0
    assert len(life.told("gpus.unobserved")) == 1
    assert re.match(r"cannot see whether the GPUs are free again", fact(life.told("engine.left")[0], "what"))
    assert remains(life.setup) == []
