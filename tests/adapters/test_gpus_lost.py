"""GPUs that are lost, and a driver that is silent, slow or missing, where everything is asked for."""

import re
from collections.abc import Iterator

import pytest

from tests.adapters.gpus_told import IDENTITY, WELL, gpus, identity, looking
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import FOREVER_S, PATIENCE_S, Asked, uuid


@pytest.fixture
def asked(nvml: FakeNvml) -> Iterator[Asked]:
    with looking(nvml) as asked:
        yield asked


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (FakeGpu(lost=True), "GPU is lost (NVML error 15)"),
        (FakeGpu(reset_required=True), "GPU requires restart (NVML error 16)"),
    ],
)
def test_a_lost_gpu_is_listed_with_what_was_known_of_it_and_the_others_as_always(
    nvml: FakeNvml, asked: Asked, gpu: FakeGpu, why: str
) -> None:
    nvml.set([FakeGpu()] * 3)
    before = gpus(asked)
    nvml.set([FakeGpu(), gpu, FakeGpu()])
    told = asked.details()["answer"]
    assert [told["gpus"][0], told["gpus"][2]] == [before[0], before[2]]
    lost = told["gpus"][1]
    assert identity(lost) == (1, uuid(1), "NVIDIA H200", "00000000:11:00.0", why, "")
    assert {value for key, value in lost.items() if key not in IDENTITY} == {None}
    assert [(pair["one"], pair["other"]) for pair in told["pairs"]] == [(0, 2)]
    nvml.set([FakeGpu()] * 3)
    assert gpus(asked) == before


def test_a_gpu_that_was_lost_before_anybody_asked_is_where_the_kernel_says(nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu(lost=True)])
    with looking(nvml, "0000:0a:00.0", "0001:3b:00.0") as asked:
        assert identity(gpus(asked)[1]) == (1, None, None, "00000001:3B:00.0", "GPU is lost (NVML error 15)", "")
    with looking(nvml, "0000:0b:00.0") as asked:  # three devices, two GPUs: nobody knows which is which
        assert identity(gpus(asked)[1])[3] is None


def test_a_gpu_that_is_lost_in_mid_answer_keeps_what_it_has_told(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetTemperature error 15 gpu 0"])
    lost, well = gpus(asked)
    assert identity(lost) == (0, uuid(0), "NVIDIA H200", "00000000:10:00.0", "GPU is lost (NVML error 15)", "")
    assert (lost["power_mw"], lost["temperature_c"], lost["persistence"]) == (75_000, None, None)
    assert well == {**WELL, "index": 1, "uuid": uuid(1), "pci": "00000000:11:00.0"}


def test_a_gpu_that_one_may_not_ask_is_listed_as_such(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetHandleByIndex error 4 gpu 1"])
    well, other = gpus(asked)
    assert well == WELL
    assert identity(other) == (1, None, None, None, "", "the driver does not let this user ask it")


@pytest.mark.parametrize("code", [2, 6, 28, 999])
def test_a_gpu_that_the_driver_does_not_find_any_more_is_lost(nvml: FakeNvml, asked: Asked, code: int) -> None:
    nvml.set([FakeGpu(), FakeGpu()], [f"nvmlDeviceGetHandleByIndex error {code} gpu 1"])
    well, other = gpus(asked)
    assert well == WELL
    assert (f"(NVML error {code})" in other["lost"], other["untold"]) == (True, "")


def test_without_a_driver_there_is_nothing_to_tell(nvml: FakeNvml, asked: Asked) -> None:
    assert asked.details()["unobserved"] == (
        'cannot list the GPUs: Driver Not Loaded (NVML error 9); load the driver ("modprobe nvidia")'
    )
    nvml.set([FakeGpu()], ["nvmlDeviceGetPowerUsage error 9"])
    assert asked.details()["unobserved"].startswith("cannot look at GPU 0: Driver Not Loaded (NVML error 9)")
    nvml.set([FakeGpu()])
    assert gpus(asked) == [WELL]


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetTemperature", "nvmlDeviceGetP2PStatus"])
def test_a_driver_that_does_not_answer_is_given_up_at_the_deadline(nvml: FakeNvml, asked: Asked, call: str) -> None:
    nvml.set([FakeGpu()] * 2, [f"{call} block"])
    assert asked.details(deadline_s=0.2)["unobserved"].startswith("the NVIDIA driver has not answered for ")
    assert asked.receive(asked.send("ping")) == {"answer": "pong"}
    assert asked.process.stdin is not None
    asked.process.stdin.close()
    assert asked.process.wait(PATIENCE_S) == 0


def test_many_gpus_do_not_make_a_reading_wait_for_all_of_them(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()] * 16)
    whole = asked.send("details", deadline_s=FOREVER_S)
    reading = asked.send("read", uuids=[uuid(0)], deadline_s=FOREVER_S)
    assert "answer" in asked.receive(reading)
    assert len(asked.receive(whole)["answer"]["gpus"]) == 16
    calls = [call for call, _, _ in nvml.calls()]
    assert calls.index("nvmlDeviceGetHandleByUUID") < calls.index("nvmlDeviceGetP2PStatus")


def test_a_driver_that_is_slow_has_told_nothing_before_it_is_through_with_the_gpus_and_no_pairs_after_the_deadline(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([FakeGpu()] * 8)
    assert len(gpus(asked)) == 8
    nvml.set([FakeGpu()] * 8, ["nvmlDeviceGetTemperature slow 60"])
    said = asked.details(deadline_s=0.1)
    assert re.fullmatch(r"the NVIDIA driver has told of [0-2] of 8 GPUs in 0\.1 s", said["unobserved"])
    nvml.set([FakeGpu()] * 2, ["nvmlDeviceGetTemperature slow 550 gpu 1"])
    told = asked.details(deadline_s=0.5)["answer"]
    assert (len(told["gpus"]), told["pairs"]) == (2, [])
