"""An inventory of a host of which GPUs are lost: who is, who keeps which index, and for whom a name is taken."""

from __future__ import annotations

from typing import Any

import pytest

from mgpu_llm.adapters.gpus import Gpu, MigSlice, resolve
from tests.adapters.gpus_told import looking
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import Asked, uuid

LOST = "GPU is lost (NVML error 15)"
SLICE = "MIG-41b3c0de-1"


def inventory(asked: Asked) -> list[dict[str, Any]]:
    found = asked.inventory()["answer"]
    assert isinstance(found, list)
    assert [gpu["index"] for gpu in found] == list(range(len(found)))
    return found


def who(asked: Asked) -> list[tuple[str, str]]:
    """(UUID, why it is lost) of each GPU, by index."""
    return [(gpu["uuid"], gpu["lost"]) for gpu in inventory(asked)]


@pytest.mark.parametrize(
    ("gpu", "why"),
    [(FakeGpu(lost=True), LOST), (FakeGpu(reset_required=True), "GPU requires restart (NVML error 16)")],
)
def test_a_lost_gpu_is_one_of_the_entries_and_the_others_keep_their_indices(
    nvml: FakeNvml, asked: Asked, gpu: FakeGpu, why: str
) -> None:
    nvml.set([FakeGpu(), gpu, FakeGpu()])
    assert who(asked) == [(uuid(0), ""), ("", why), (uuid(2), "")]
    assert inventory(asked)[1] == {
        "index": 1,
        "uuid": "",
        "name": "a lost GPU",
        "memory_total_bytes": 0,
        "slices": [],
        "whole": "",
        "lost": why,
    }


@pytest.mark.parametrize("code", [2, 6, 8, 10, 11, 28, 999])
def test_a_gpu_whose_handle_cannot_be_had_is_lost(nvml: FakeNvml, asked: Asked, code: int) -> None:
    nvml.set([FakeGpu(), FakeGpu()], [f"nvmlDeviceGetHandleByIndex error {code} gpu 0"])
    lost, well = who(asked)
    assert (lost[0], f"(NVML error {code})" in lost[1]) == ("", True)
    assert well == (uuid(1), "")


def test_a_gpu_that_fails_in_mid_answer_is_lost_under_its_own_name(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetMemoryInfo error 999 gpu 1"])
    well, lost = inventory(asked)
    assert (well["uuid"], well["lost"]) == (uuid(0), "")
    assert (lost["uuid"], lost["name"]) == (uuid(1), "NVIDIA H200")
    assert lost["lost"] == "Unknown Error (NVML error 999)"


def test_a_gpu_that_one_may_not_ask_and_a_driver_that_goes_are_no_lost_gpus(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetHandleByIndex error 4 gpu 1"])
    assert asked.inventory()["unobserved"] == (
        "cannot identify GPU 1: Insufficient Permissions (NVML error 4); give this user access to /dev/nvidia*"
    )
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetUUID error 9 gpu 1"])
    assert asked.inventory()["unobserved"].startswith("cannot identify GPU 1: Driver Not Loaded (NVML error 9)")
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetUUID error 3 gpu 1"])
    assert asked.inventory()["unobserved"] == "cannot identify GPU 1: Not Supported (NVML error 3)"


def test_a_lost_gpu_is_where_the_kernel_says_and_nowhere_where_that_lists_others(nvml: FakeNvml) -> None:
    nvml.set([FakeGpu(), FakeGpu(lost=True)])
    with looking(nvml, "0000:0a:00.0", "0001:3b:00.0") as asked:
        assert inventory(asked)[1]["lost"] == f"{LOST}, at 00000001:3B:00.0"
    with looking(nvml, "0000:0b:00.0") as asked:
        assert inventory(asked)[1]["lost"] == LOST


def test_a_lost_gpu_that_comes_back_is_found_by_the_next_inventory_and_only_that_starts_afresh(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([FakeGpu(), FakeGpu(lost=True)])
    assert who(asked) == [(uuid(0), ""), ("", LOST)]
    assert "answer" in asked.read(uuid(0))
    assert sum(call == "nvmlInit_v2" for call, _, _ in nvml.calls()) == 1
    nvml.set([FakeGpu(), FakeGpu()])
    assert who(asked) == [(uuid(0), ""), (uuid(1), "")]


def sound(index: int, *slices: str) -> Gpu:
    parts = tuple(MigSlice(index=0, uuid=name, memory_total_bytes=7, memory_used_bytes=0) for name in slices)
    return Gpu(index=index, uuid=uuid(index), name="NVIDIA H200", memory_total_bytes=1, slices=parts)


def lost(index: int, known: str = "") -> Gpu:
    return Gpu(index=index, uuid=known, name="a lost GPU", memory_total_bytes=0, lost=LOST)


def test_a_lost_gpu_is_named_by_its_index_or_by_its_uuid_where_that_is_told() -> None:
    host = (sound(0), lost(1), lost(2, uuid(2)), sound(3))
    assert resolve([3, 1, uuid(2)], host) == (host[3], host[1], host[2])
    assert resolve("all", host) == host


def test_a_uuid_that_no_gpu_tells_is_taken_for_that_of_a_lost_one_that_nothing_else_names() -> None:
    host = (sound(0), lost(1), lost(2), lost(3, uuid(3)))
    first, second = resolve([uuid(8), 1], host)
    assert (first.entry, first.uuid, second) == ("2", uuid(8), host[1])
    assert first.lost == f'{LOST}; no GPU that answers has "{uuid(8)}"'
    assert [gpu.entry for gpu in resolve([uuid(8), uuid(0), "GPU-9"], host)] == ["1", "0", "2"]


def test_a_slice_that_no_gpu_tells_is_taken_for_one_of_a_lost_gpu_and_keeps_its_name() -> None:
    host = (sound(0, "MIG-a"), lost(1))
    gone, there = resolve([SLICE, "MIG-a"], host)
    assert (gone.entry, gone.index, bool(gone.whole), gone.lost) == (
        SLICE,
        1,
        True,
        f'{LOST}; no GPU that answers has "{SLICE}"',
    )
    assert (there.entry, there.lost) == ("MIG-a", "")
    assert [gpu.index for gpu in resolve([SLICE, "MIG-f"], host)] == [1, 1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["GPU-8", "GPU-9"], 'no GPU "GPU-9": this host has 0-1 (1 x NVIDIA H200, 1 x a lost GPU)'),
        ([1, "GPU-8"], 'no GPU "GPU-8": this host has 0-1 (1 x NVIDIA H200, 1 x a lost GPU)'),
        ([1, SLICE], f'no MIG slice "{SLICE}": this host has none (sudo nvidia-smi -mig 1 divides a GPU)'),
        ([7, "gpu-8"], 'no GPU 7 and "gpu-8": this host has 0-1 (1 x NVIDIA H200, 1 x a lost GPU)'),
        (["GPU-8", "GPU-8"], 'GPU 1 is named 2 times ("GPU-8" and "GPU-8")'),
    ],
)
def test_more_names_than_lost_gpus_and_names_of_no_gpu_are_wrong(wanted: list[int | str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        resolve(wanted, (sound(0), lost(1)))
    assert str(refused.value) == message
