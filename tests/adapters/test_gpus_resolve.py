"""Which GPUs a configuration names."""

import pytest

from mgpu_llm.adapters.gpus import Gpu, resolve
from tests.support.fake_nvml.asked import uuid


def host(count: int, name: str = "NVIDIA H200") -> tuple[Gpu, ...]:
    return tuple(Gpu(index=i, uuid=uuid(i), name=name, memory_total_bytes=1) for i in range(count))


def test_all_resolves_to_every_gpu_of_the_host() -> None:
    assert resolve("all", host(4)) == host(4)
    assert resolve("all", ()) == ()


def test_indices_uuids_and_unique_beginnings_resolve_in_the_order_wanted() -> None:
    gpus = host(16)
    assert resolve([3, uuid(0), "GPU-a000000f"], gpus) == (gpus[3], gpus[0], gpus[15])


def test_a_whole_uuid_is_itself_even_where_it_begins_another() -> None:
    short, long = (
        Gpu(index=i, uuid=name, name="L4", memory_total_bytes=1) for i, name in enumerate(["GPU-a", "GPU-ab"])
    )
    assert resolve(["GPU-a"], (short, long)) == (short,)


@pytest.mark.parametrize(
    ("wanted", "inventory", "message"),
    [
        ([7], host(4), "no GPU 7: this host has 0-3 (4 x NVIDIA H200)"),
        ([1], host(1), "no GPU 1: this host has 0 (1 x NVIDIA H200)"),
        ([0], (), "no GPU 0: this host has none"),
        ([-1, 0, 9, "GPU-x"], host(4), 'no GPU -1, 9 and "GPU-x": this host has 0-3 (4 x NVIDIA H200)'),
        (["0"], host(2), 'no GPU "0": this host has 0-1 (2 x NVIDIA H200)'),
        (
            ["GPU-a"],
            host(3),
            '"GPU-a" begins the UUID of 3 GPUs (0, 1, 2), give more of it',
        ),
        ([1, 0, 1], host(2), "GPU 1 is named 2 times (1 and 1)"),
        ([0, uuid(0)], host(2), f'GPU 0 is named 2 times (0 and "{uuid(0)}")'),
        (
            [5, 0, 0],
            (*host(1), Gpu(index=1, uuid="GPU-b", name="NVIDIA L4", memory_total_bytes=1)),
            "no GPU 5: this host has 0-1 (1 x NVIDIA H200, 1 x NVIDIA L4); GPU 0 is named 2 times (0 and 0)",
        ),
        ([6, 6], host(1), "no GPU 6: this host has 0 (1 x NVIDIA H200)"),
    ],
)
def test_gpus_that_cannot_be_had_are_all_named_in_one_line(
    wanted: list[int | str], inventory: tuple[Gpu, ...], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        resolve(wanted, inventory)
    assert str(refused.value) == message
