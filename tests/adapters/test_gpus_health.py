"""Whether a GPU can be used at all, with the real pynvml on a driver library made small, in a process of its own."""

import pytest

from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import Asked, uuid


def initialised(nvml: FakeNvml) -> int:
    return sum(call == "nvmlInit_v2" for call, _, _ in nvml.calls())


def health(asked: Asked, count: int) -> list[tuple[str, str]]:
    """(lost, recovery action) of each GPU, in order."""
    told = asked.health(*map(uuid, range(count)))["answer"]
    assert [gpu["uuid"] for gpu in told] == [uuid(index) for index in range(count)]
    return [(gpu["lost"], gpu["recovery_action"]) for gpu in told]


def test_gpus_that_work_and_need_nothing_say_nothing(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()] * 16)
    assert health(asked, 16) == [("", "")] * 16
    assert health(asked, 0) == []
    assert initialised(nvml) == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "reset"),
        (2, "reboot"),
        (3, "drain-p2p"),
        (4, "drain-and-reset"),
        (5, "recover-imex-domain"),
        (6, "bus-reset"),
        (7, "system-reboot"),
        (8, "unknown-8"),
    ],
)
def test_what_the_driver_asks_of_the_operator_has_a_word(nvml: FakeNvml, asked: Asked, number: int, words: str) -> None:
    nvml.set([FakeGpu(), FakeGpu(recovery=number)])
    assert health(asked, 2) == [("", ""), ("", words)]


@pytest.mark.parametrize("silence", [FakeGpu(recovery=None), "error 3", "error 13", "error 4", "error 999"])
def test_an_action_that_is_not_told_is_none(nvml: FakeNvml, asked: Asked, silence: FakeGpu | str) -> None:
    if isinstance(silence, FakeGpu):
        nvml.set([silence])
    else:
        nvml.set([FakeGpu(recovery=1)], [f"nvmlDeviceGetFieldValues {silence}"])
    assert health(asked, 1) == [("", "")]


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (FakeGpu(lost=True), "GPU is lost (NVML error 15)"),
        (FakeGpu(reset_required=True), "GPU requires restart (NVML error 16)"),
    ],
)
def test_a_lost_gpu_is_one_of_the_entries_until_it_is_back(
    nvml: FakeNvml, asked: Asked, gpu: FakeGpu, why: str
) -> None:
    nvml.set([FakeGpu()] * 3)
    assert health(asked, 3) == [("", "")] * 3
    nvml.set([FakeGpu(), gpu, FakeGpu(recovery=2)])
    for _ in range(2):
        assert health(asked, 3) == [("", ""), (why, ""), ("", "reboot")]
    nvml.set([FakeGpu()] * 3)
    assert health(asked, 3) == [("", "")] * 3
    assert initialised(nvml) == 3


@pytest.mark.parametrize("code", [2, 6, 28, 999])
def test_a_gpu_that_the_driver_does_not_find_any_more_is_lost(nvml: FakeNvml, asked: Asked, code: int) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    assert health(asked, 2) == [("", ""), ("", "")]
    # What has its handle already is asked by it, and says only that something is wrong; the next search says what.
    nvml.set(
        [FakeGpu(), FakeGpu()],
        ["nvmlDeviceGetMemoryInfo error 999 gpu 1", f"nvmlDeviceGetHandleByUUID error {code} gpu 1"],
    )
    assert health(asked, 2) == [("", ""), ("", "")]
    ((_, healthy), (lost, _)) = health(asked, 2)
    assert (healthy, f"(NVML error {code})" in lost) == ("", True)


def test_where_the_search_fails_for_another_that_is_lost_only_that_one_is_called_so(
    nvml: FakeNvml, asked: Asked
) -> None:
    search = [f"nvmlDeviceGetHandleByUUID error 15 gpu {index}" for index in range(3)]
    nvml.set([FakeGpu(), FakeGpu(lost=True), FakeGpu()], search)
    assert health(asked, 3) == [("", ""), ("GPU is lost (NVML error 15)", ""), ("", "")]
    assert [reading["index"] for reading in asked.read(uuid(0), uuid(2))["answer"]] == [0, 2]


def test_without_a_driver_nothing_is_known(nvml: FakeNvml, asked: Asked) -> None:
    assert asked.health(uuid(0))["unobserved"] == (
        'cannot ask for the health of the GPUs: Driver Not Loaded (NVML error 9); load the driver ("modprobe nvidia")'
    )
    nvml.set([FakeGpu()], ["nvmlDeviceGetMemoryInfo error 9"])
    assert "Driver Not Loaded" in asked.health(uuid(0))["unobserved"]
    nvml.set([FakeGpu()])
    assert health(asked, 1) == [("", "")]


def test_a_lost_gpu_leaves_the_readings_of_the_others(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(used_bytes=7), FakeGpu(lost=True)])
    assert health(asked, 2)[1][0]
    assert asked.reading()["memory_used_bytes"] == 7


def test_a_driver_that_does_not_answer_is_given_up_at_the_deadline(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()], ["nvmlDeviceGetFieldValues block"])
    said = asked.receive(asked.send("health", uuids=[uuid(0)], deadline_s=0.2))
    assert said["unobserved"].startswith("the NVIDIA driver has not answered for ")
