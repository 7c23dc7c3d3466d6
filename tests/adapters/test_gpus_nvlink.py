"""Which GPUs NVLink joins, with the real pynvml on a driver library made small, in a process of its own."""

import asyncio
import re
import subprocess
from itertools import combinations

import pytest

from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import PATIENCE_S, Asked, uuid


def initialised(nvml: FakeNvml) -> int:
    return sum(call == "nvmlInit_v2" for call, _, _ in nvml.calls())


def test_bridges_join_two_and_two(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()] * 4, nvlinks=[(0, 1), (3, 2)])
    assert asked.nvlinked(*map(uuid, range(4)))["answer"] == [[uuid(0), uuid(1)], [uuid(2), uuid(3)]]


def test_a_switch_joins_every_two(nvml: FakeNvml, asked: Asked) -> None:
    every = list(combinations(range(8), 2))
    nvml.set([FakeGpu()] * 8, nvlinks=every)
    assert asked.nvlinked(*map(uuid, range(8)))["answer"] == [[uuid(one), uuid(other)] for one, other in every]


def test_only_the_gpus_asked_for_are_told_in_whatever_order_and_however_often(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()] * 3, nvlinks=[(0, 1), (0, 2), (1, 2)])
    assert asked.nvlinked(uuid(2), uuid(0), uuid(2))["answer"] == [[uuid(0), uuid(2)]]


def test_gpus_without_nvlink_are_no_pair(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    assert asked.nvlinked(uuid(0), uuid(1)) == {"answer": []}


@pytest.mark.parametrize("uuids", [[], [uuid(0)]])
def test_fewer_than_two_gpus_are_no_pair_whatever_the_driver_does(asked: Asked, uuids: list[str]) -> None:
    assert asked.nvlinked(*uuids) == {"answer": []}


@pytest.mark.parametrize("status", [1, 2, 3, 4, 5])
def test_a_link_that_cannot_be_used_is_none(nvml: FakeNvml, asked: Asked, status: int) -> None:
    nvml.write(f"gpu 0\ngpu 1\nnvlink 0 1 status {status}\n")
    assert asked.nvlinked(uuid(0), uuid(1)) == {"answer": []}


@pytest.mark.parametrize(
    "silence",
    ["nvlink 1 2 status 6", *(f"fault nvmlDeviceGetP2PStatus error {code} gpu 1" for code in (3, 4, 13, 21, 25))],
)
def test_a_driver_that_does_not_tell_of_one_pair_has_told_nothing(nvml: FakeNvml, asked: Asked, silence: str) -> None:
    nvml.write(f"gpu 0\ngpu 1\ngpu 2\nnvlink 0 1\n{silence}\n")
    assert asked.nvlinked(uuid(0), uuid(1), uuid(2)) == {
        "unobserved": f'cannot tell whether NVLink joins GPU "{uuid(1)}" and GPU "{uuid(2)}": the driver does not say'
    }
    assert asked.nvlinked(uuid(0), uuid(1))["answer"] == [[uuid(0), uuid(1)]]
    assert initialised(nvml) == 1


def test_a_gpu_that_is_lost_is_named_with_its_peer_and_the_next_call_starts_nvml_afresh(
    nvml: FakeNvml, asked: Asked
) -> None:
    nvml.set([FakeGpu(), FakeGpu()], nvlinks=[(0, 1)])
    assert asked.nvlinked(uuid(0), uuid(1))["answer"]
    nvml.set([FakeGpu(), FakeGpu(lost=True)], nvlinks=[(0, 1)])
    assert asked.nvlinked(uuid(0), uuid(1))["unobserved"] == (
        f'cannot tell whether NVLink joins GPU "{uuid(0)}" and GPU "{uuid(1)}": GPU is lost (NVML error 15)'
    )
    nvml.set([FakeGpu(), FakeGpu()], nvlinks=[(0, 1)])
    assert asked.nvlinked(uuid(0), uuid(1))["answer"]
    assert initialised(nvml) == 2


def test_a_call_that_blocks_is_given_up_at_its_deadline(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlDeviceGetP2PStatus block"])
    said = asked.receive(asked.send("nvlinked", uuids=[uuid(0), uuid(1)], deadline_s=0.2))
    assert said["unobserved"].startswith("the NVIDIA driver has not answered for ")


@pytest.mark.gpu
def test_real_gpus_are_joined_as_nvidia_smi_says() -> None:
    async def told() -> tuple[list[str], frozenset[frozenset[str]]]:
        gpus = Gpus()
        try:
            uuids = [gpu.uuid for gpu in await gpus.inventory(PATIENCE_S)]
            return uuids, await gpus.nvlinked(uuids, PATIENCE_S)
        except GpusUnobserved as unobserved:
            pytest.skip(unobserved.reason)

    uuids, linked = asyncio.run(told())
    said = subprocess.run(["nvidia-smi", "topo", "-p2p", "n"], capture_output=True, text=True, check=True).stdout
    rows = [re.split(r"\s+", row.strip())[1:] for row in said.splitlines() if re.match(r"\s*GPU\d+\s.*\bX\b", row)]
    assert len(rows) == len(uuids)
    pairs = combinations(range(len(uuids)), 2)
    assert linked == {frozenset((uuids[one], uuids[other])) for one, other in pairs if rows[one][other] == "OK"}
