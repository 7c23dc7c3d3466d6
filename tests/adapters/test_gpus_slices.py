"""MIG slices, as the real pynvml finds them on a driver library made small, and as a configuration names them."""

from __future__ import annotations

import pytest

from mgpu_llm.adapters.gpus import Gpu, MigSlice, resolve
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import Asked, uuid

ONE, TWO, OTHER = "MIG-41b3c0de-1", "MIG-41b3ffff-2", "MIG-c7"
SLICED = FakeGpu(
    slices=((ONE, 40 << 30), (TWO, 20 << 30)), slice_used_bytes=5 << 30, utilisation_percent=70, processes=((41, 7),)
)


def gpu(index: int, *slices: str | None) -> Gpu:
    parts = tuple(
        MigSlice(index=at, uuid=name, memory_total_bytes=None if at else 7, memory_used_bytes=0)
        for at, name in enumerate(slices)
    )
    return Gpu(index=index, uuid=uuid(index), name="NVIDIA H100", memory_total_bytes=80, slices=parts)


HOST = (gpu(0, ONE, None, TWO), gpu(1), gpu(2, OTHER))


def test_a_slice_is_named_by_its_uuid_or_a_unique_beginning_and_is_called_so_by_cuda() -> None:
    (whole, first) = resolve([1, "MIG-41b3c"], HOST)
    assert (whole.entry, whole.whole) == ("1", "")
    assert (first.entry, first.uuid, first.whole, first.index) == (ONE, ONE, uuid(0), 0)
    assert (first.name, first.memory_total_bytes) == ("NVIDIA H100", 7)
    (second,) = resolve([TWO], HOST)
    assert (second.entry, second.memory_total_bytes) == (TWO, 0)
    assert [gpu.entry for gpu in resolve("all", HOST)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("wanted", "host", "message"),
    [
        (["MIG-41b3"], HOST, f'"MIG-41b3" begins the UUID of 2 MIG slices ({ONE}, {TWO}), give more of it'),
        (["MIG-f"], HOST, f'no MIG slice "MIG-f": this host has {ONE} of GPU 0, {TWO} of GPU 0, {OTHER} of GPU 2'),
        (
            ["MIG-f", 9],
            HOST[1:2],
            'no GPU 9: this host has 1 (1 x NVIDIA H100); no MIG slice "MIG-f": this host has none (sudo nvidia-smi -mig 1 '
            "divides a GPU)",
        ),
        ([ONE, "MIG-41b3c"], HOST, f'MIG slice {ONE} is named 2 times ("{ONE}" and "MIG-41b3c")'),
        ([OTHER, 2], HOST, f'GPU 2 is named both whole and by its slice "{OTHER}"'),
    ],
)
def test_slices_that_cannot_be_had_are_named_with_the_reason(
    wanted: list[int | str], host: tuple[Gpu, ...], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        resolve(wanted, host)
    assert str(refused.value) == message


def test_the_inventory_has_the_slices_of_each_gpu_and_none_where_they_are_not_told(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([SLICED, FakeGpu()])
    divided, whole = asked.inventory()["answer"]
    assert [part["uuid"] for part in divided["slices"]] == [ONE, TWO]
    assert [part["memory_total_bytes"] for part in divided["slices"]] == [40 << 30, 20 << 30]
    assert whole["slices"] == []
    nvml.set([SLICED], ["nvmlDeviceGetMigMode error 3"])
    assert asked.inventory()["answer"][0]["slices"] == []


def test_a_slice_is_read_by_itself_and_tells_no_utilisation_or_power(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), SLICED])
    first, second = asked.read(ONE, TWO)["answer"]
    assert first == {
        "uuid": ONE,
        "index": 1,
        "memory_used_bytes": 5 << 30,
        "memory_total_bytes": 40 << 30,
        "utilisation_percent": None,
        "power_mw": None,
        "processes": [[41, 7]],
    }
    assert (second["index"], second["memory_used_bytes"], second["memory_total_bytes"]) == (1, 0, 20 << 30)
    nvml.set([FakeGpu(), FakeGpu()])
    assert "Not Found" in asked.read(ONE)["unobserved"]


def test_a_slice_is_as_well_as_its_gpu_and_has_its_address(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), SLICED])
    assert asked.health(TWO)["answer"] == [{"uuid": TWO, "lost": "", "recovery_action": ""}]
    assert asked.receive(asked.send("addresses", uuids=[TWO], deadline_s=60))["answer"] == ["00000000:11:00.0"]
    nvml.change(1, recovery=1)
    assert asked.health(TWO)["answer"][0]["recovery_action"] == "reset"
    nvml.change(1, lost=True)
    assert asked.health(TWO)["answer"][0]["lost"] == "GPU is lost (NVML error 15)"
    nvml.set([FakeGpu(), FakeGpu()])
    assert asked.health(TWO)["answer"][0]["lost"]
