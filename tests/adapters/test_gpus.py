"""The GPU adapter with the real pynvml on a driver library made small, in a process of its own."""

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved, resolve
from tests.support.fake_nvml import SONAME, FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import FOREVER_S, PATIENCE_S, Asked, asking, uuid


def wait_until(happened: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def called(nvml: FakeNvml, name: str) -> int:
    return sum(call == name for call, _, _ in nvml.calls())


@pytest.mark.parametrize("count", [0, 2, 16])
def test_the_inventory_names_every_gpu_by_index_uuid_name_and_memory(nvml: FakeNvml, asked: Asked, count: int) -> None:
    nvml.set([FakeGpu(name=f"NVIDIA H200 no. {index}", total_bytes=151_000_000_000 + index) for index in range(count)])
    assert asked.inventory()["answer"] == [
        {
            "index": index,
            "uuid": uuid(index),
            "name": f"NVIDIA H200 no. {index}",
            "memory_total_bytes": 151_000_000_000 + index,
            "slices": [],
            "whole": "",
            "lost": "",
        }
        for index in range(count)
    ]


def test_a_reading_tells_memory_utilisation_power_and_processes_in_the_order_asked(
    nvml: FakeNvml, asked: Asked
) -> None:
    busy = FakeGpu(used_bytes=7, utilisation_percent=100, power_mw=699_000, processes=((1234, 5), (99, None)))
    nvml.set([FakeGpu(), busy])
    assert asked.read(uuid(1), uuid(0))["answer"] == [
        {
            "uuid": uuid(1),
            "index": 1,
            "memory_used_bytes": 7,
            "memory_total_bytes": 150_754_820_096,
            "utilisation_percent": 100,
            "power_mw": 699_000,
            "processes": [[1234, 5], [99, None]],
        },
        {
            "uuid": uuid(0),
            "index": 0,
            "memory_used_bytes": 0,
            "memory_total_bytes": 150_754_820_096,
            "utilisation_percent": 0,
            "power_mw": 75_000,
            "processes": [],
        },
    ]


def test_the_addresses_of_gpus_are_told_in_the_order_asked_or_that_the_driver_does_not_tell(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    ask = partial(asked.send, "addresses", deadline_s=FOREVER_S)
    assert asked.receive(ask(uuids=[uuid(1), uuid(0)]))["answer"] == ["00000000:11:00.0", "00000000:10:00.0"]
    assert asked.receive(ask(uuids=[]))["answer"] == []
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetPciInfo error 3 gpu 1"])
    assert asked.receive(ask(uuids=[uuid(0), uuid(1)]))["unobserved"] == (
        f'cannot tell the PCI address of GPU "{uuid(1)}": Not Supported (NVML error 3)'
    )


def test_memory_in_use_leaves_out_the_reserve_of_the_driver(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(used_bytes=650_000_000, reserved_bytes=600_000_000)])
    assert asked.reading()["memory_used_bytes"] == 650_000_000


@pytest.mark.parametrize("code", [3, 13, 25])
def test_memory_of_a_driver_that_does_not_know_the_reserve_holds_both(nvml: FakeNvml, asked: Asked, code: int) -> None:
    nvml.set(
        [FakeGpu(used_bytes=650_000_000, reserved_bytes=600_000_000)],
        [f"nvmlDeviceGetMemoryInfo_v2 error {code}"],
    )
    assert asked.reading()["memory_used_bytes"] == 1_250_000_000


def test_what_a_gpu_does_not_tell_is_none_and_never_zero(nvml: FakeNvml, asked: Asked) -> None:
    faults = ["nvmlDeviceGetUtilizationRates error 3", "nvmlDeviceGetPowerUsage error 3"]
    nvml.set([FakeGpu(used_bytes=7)], [*faults, "nvmlDeviceGetComputeRunningProcesses error 4"])
    reading = asked.reading()
    assert reading["memory_used_bytes"] == 7
    assert (reading["utilisation_percent"], reading["power_mw"], reading["processes"]) == (None, None, None)


def test_a_change_of_the_gpus_is_seen_at_the_next_reading(nvml: FakeNvml, asked: Asked) -> None:
    for used_bytes in (1, 2, 3):
        nvml.set([FakeGpu(used_bytes=used_bytes)])
        assert asked.reading()["memory_used_bytes"] == used_bytes


def test_all_calls_come_from_one_thread_that_is_not_the_first_and_initialises_once(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    asked.inventory()
    asked.reading()
    asked.inventory()
    (thread,) = {thread for _, _, thread in nvml.calls()}
    assert thread != asked.process.pid
    assert called(nvml, "nvmlInit_v2") == 1


def test_a_host_without_a_library_that_loads_is_unobserved_and_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / SONAME).touch()  # hides the one of a host that has a driver
    with asking({"LD_LIBRARY_PATH": str(tmp_path)}) as asked:
        assert asked.inventory()["unobserved"] == (
            "cannot list the GPUs: NVML Shared Library Not Found (NVML error 12)"
            "; install the NVIDIA driver (libnvidia-ml.so.1)"
        )


def test_a_driver_that_comes_up_after_us_is_found_at_the_next_call(nvml: FakeNvml, asked: Asked) -> None:
    assert asked.inventory()["unobserved"] == (
        'cannot list the GPUs: Driver Not Loaded (NVML error 9); load the driver ("modprobe nvidia")'
    )
    nvml.set([FakeGpu()])
    assert [gpu["uuid"] for gpu in asked.inventory()["answer"]] == [uuid(0)]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("nvmlDeviceGetMemoryInfo error 999", "Unknown Error (NVML error 999)"),
        ("nvmlDeviceGetMemoryInfo error 1", "Uninitialized (NVML error 1)"),
        ("nvmlDeviceGetUtilizationRates error 15", "GPU is lost (NVML error 15)"),
        ("nvmlDeviceGetComputeRunningProcesses error 16", "GPU requires restart (NVML error 16)"),
        ("nvmlDeviceGetHandleByUUID error 17", "The operating system has blocked the request. (NVML error 17)"),
    ],
)
def test_an_error_names_the_gpu_and_the_next_call_starts_nvml_afresh(
    nvml: FakeNvml, asked: Asked, fault: str, why: str
) -> None:
    nvml.set([FakeGpu()], [fault])
    assert asked.read(uuid(0))["unobserved"] == f'cannot read GPU "{uuid(0)}": {why}'
    nvml.set([FakeGpu(used_bytes=7)])
    assert asked.reading()["memory_used_bytes"] == 7
    assert (called(nvml, "nvmlInit_v2"), called(nvml, "nvmlShutdown")) == (2, 1)


def test_an_unknown_uuid_is_unobserved_and_named(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()])
    assert asked.read(uuid(0), "GPU-none")["unobserved"] == 'cannot read GPU "GPU-none": Not Found (NVML error 6)'


def test_a_gpu_that_is_lost_and_comes_back_is_read_again(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    assert "answer" in asked.read(uuid(0), uuid(1))
    nvml.set([FakeGpu(), FakeGpu(lost=True)])
    assert asked.read(uuid(0), uuid(1))["unobserved"] == f'cannot read GPU "{uuid(1)}": GPU is lost (NVML error 15)'
    assert "answer" in asked.read(uuid(0))
    assert [gpu["lost"] for gpu in asked.inventory()["answer"]] == ["", "GPU is lost (NVML error 15)"]
    nvml.set([FakeGpu(), FakeGpu(used_bytes=9)])
    assert [reading["memory_used_bytes"] for reading in asked.read(uuid(1), uuid(0))["answer"]] == [9, 0]


def test_a_driver_that_goes_and_comes_back_is_read_again(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()])
    asked.reading()
    nvml.unload()
    assert "GPU is lost" in asked.read(uuid(0))["unobserved"]
    assert "Driver Not Loaded" in asked.read(uuid(0))["unobserved"]
    assert "Driver Not Loaded" in asked.inventory()["unobserved"]
    nvml.set([FakeGpu(used_bytes=7)])
    assert asked.reading()["memory_used_bytes"] == 7


def test_while_a_call_blocks_the_event_loop_answers(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()], ["nvmlDeviceGetUtilizationRates block"])
    blocked = asked.send("read", uuids=[uuid(0)], deadline_s=FOREVER_S)
    wait_until(lambda: called(nvml, "nvmlDeviceGetUtilizationRates") == 1)
    for _ in range(3):
        assert asked.receive(asked.send("ping")) == {"answer": "pong"}
    nvml.set([FakeGpu(used_bytes=7)])
    assert asked.receive(blocked)["answer"][0]["memory_used_bytes"] == 7


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"])
def test_a_call_that_blocks_is_given_up_at_its_deadline_and_the_next_at_once_until_the_driver_is_back(
    nvml: FakeNvml, asked: Asked, call: str
) -> None:
    nvml.set([FakeGpu()], [f"{call} block"])
    blocked = asked.send("read", uuids=[uuid(0)], deadline_s=0.2)
    wait_until(lambda: any(name.startswith(call) for name, _, _ in nvml.calls()))
    calls_of_the_first = nvml.calls()
    said = asked.receive(blocked)
    assert re.fullmatch(r"the NVIDIA driver has not answered for [0-9.]+ s", said["unobserved"])
    for said in (asked.read(uuid(0)), asked.inventory()):  # with no deadline to wait for
        assert said["unobserved"].startswith("the NVIDIA driver has not answered for ")
    assert nvml.calls() == calls_of_the_first
    nvml.set([FakeGpu(used_bytes=7)])
    wait_until(lambda: "answer" in asked.read(uuid(0)))
    assert asked.reading()["memory_used_bytes"] == 7


def test_a_call_that_waited_behind_a_blocked_one_is_never_made(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()], ["nvmlDeviceGetUtilizationRates block"])
    blocked = asked.send("read", uuids=[uuid(0)], deadline_s=FOREVER_S)
    wait_until(lambda: called(nvml, "nvmlDeviceGetUtilizationRates") == 1)
    assert "has not answered" in asked.receive(asked.send("inventory", deadline_s=0.2))["unobserved"]
    assert "has not answered" in asked.inventory()["unobserved"]
    nvml.set([FakeGpu(used_bytes=7)])
    assert asked.receive(blocked)["answer"][0]["memory_used_bytes"] == 7
    asked.reading()
    assert called(nvml, "nvmlDeviceGetCount_v2") == 0


def test_a_caller_that_stops_waiting_leaves_the_driver_to_the_next(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()], ["nvmlDeviceGetUtilizationRates block"])
    cancelled = asked.send("read", uuids=[uuid(0)], deadline_s=FOREVER_S)
    wait_until(lambda: called(nvml, "nvmlDeviceGetUtilizationRates") == 1)
    asked.send("cancel", of=cancelled)
    following = asked.send("read", uuids=[uuid(0)], deadline_s=FOREVER_S)
    assert asked.receive(asked.send("ping")) == {"answer": "pong"}
    nvml.set([FakeGpu(used_bytes=7)])
    assert asked.receive(following)["answer"][0]["memory_used_bytes"] == 7


@pytest.mark.parametrize("deadline_s", [0.2, FOREVER_S])
def test_a_process_with_a_stuck_call_ends_when_it_wants_to(nvml: FakeNvml, asked: Asked, deadline_s: float) -> None:
    nvml.set([FakeGpu()], ["nvmlDeviceGetUtilizationRates block"])
    blocked = asked.send("read", uuids=[uuid(0)], deadline_s=deadline_s)
    wait_until(lambda: called(nvml, "nvmlDeviceGetUtilizationRates") == 1)
    if deadline_s != FOREVER_S:
        assert "has not answered" in asked.receive(blocked)["unobserved"]
    assert asked.process.stdin is not None
    asked.process.stdin.close()
    assert asked.process.wait(PATIENCE_S) == 0


@pytest.mark.gpu
def test_real_gpus_tell_the_same_in_inventory_and_reading() -> None:
    async def both() -> None:
        gpus = Gpus()
        try:
            inventory = await gpus.inventory(PATIENCE_S)
        except GpusUnobserved as unobserved:
            pytest.skip(unobserved.reason)
        readings = await gpus.read([gpu.uuid for gpu in inventory], PATIENCE_S)
        assert [(gpu.index, gpu.uuid) for gpu in inventory] == [(each.index, each.uuid) for each in readings]
        for gpu, each in zip(inventory, readings, strict=True):
            assert gpu.uuid.startswith("GPU-")
            assert 0 <= each.memory_used_bytes <= gpu.memory_total_bytes
            assert resolve([gpu.uuid[:13]], inventory) == (gpu,)

    asyncio.run(both())
