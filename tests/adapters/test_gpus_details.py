"""All that the driver tells of GPUs, with the real pynvml on a driver library made small, in a process of its own."""

import asyncio
import subprocess
from collections.abc import Iterator
from itertools import combinations

import pytest

from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from tests.adapters.gpus_told import WELL, gpus, looking
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_nvml.asked import PATIENCE_S, Asked

#: What is told by one call of the driver alone.
CALLS = {
    "nvmlDeviceGetPciInfo": ("pci",),
    "nvmlDeviceGetUUID": ("uuid",),
    "nvmlDeviceGetName": ("name",),
    "nvmlDeviceGetUtilizationRates": ("utilisation_percent",),
    "nvmlDeviceGetPowerUsage": ("power_mw",),
    "nvmlDeviceGetEnforcedPowerLimit": ("power_limit_mw",),
    "nvmlDeviceGetTemperature": ("temperature_c",),
    "nvmlDeviceGetEccMode": ("ecc", "ecc_uncorrected"),
    "nvmlDeviceGetTotalEccErrors": ("ecc_uncorrected",),
    "nvmlDeviceGetFieldValues": ("recovery_action",),
    "nvmlDeviceGetMigMode": ("mig", "mig_slices"),
    "nvmlDeviceGetComputeMode": ("compute_mode",),
    "nvmlDeviceGetPersistenceMode": ("persistence",),
    "nvmlDeviceGetComputeRunningProcesses": ("processes",),
    "nvmlDeviceGetGraphicsRunningProcesses": (),
    "nvmlDeviceGetMemoryInfo": (
        "memory_total_bytes",
        "memory_used_bytes",
        "memory_free_bytes",
        "memory_reserved_bytes",
    ),
}


@pytest.fixture
def asked(nvml: FakeNvml) -> Iterator[Asked]:
    with looking(nvml) as asked:
        yield asked


def test_a_host_without_gpus_has_versions_all_the_same(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([])
    assert asked.details()["answer"] == {
        "driver": "570.124.06",
        "cuda": "12.8",
        "nvml": "12.570.124.06",
        "gpus": [],
        "pairs": [],
    }
    nvml.set([], ["nvmlSystemGetDriverVersion error 3", "nvmlSystemGetCudaDriverVersion error 13"])
    assert [asked.details()["answer"][key] for key in ("driver", "cuda")] == [None, None]


def test_a_gpu_that_is_well_tells_everything(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()])
    assert gpus(asked) == [WELL]
    busy = FakeGpu(
        used_bytes=70,
        reserved_bytes=20,
        total_bytes=100,
        utilisation_percent=99,
        power_mw=690_000,
        power_limit_mw=650_000,
        temperature_c=81,
        ecc_errors=3,
        recovery=4,
        persistence=False,
        compute_mode=3,
    )
    nvml.set([busy])
    (told,) = gpus(asked)
    assert {key: value for key, value in told.items() if value != WELL[key]} == {
        "memory_total_bytes": 100,
        "memory_used_bytes": 70,
        "memory_free_bytes": 10,
        "memory_reserved_bytes": 20,
        "utilisation_percent": 99,
        "power_mw": 690_000,
        "power_limit_mw": 650_000,
        "temperature_c": 81,
        "ecc_uncorrected": 3,
        "recovery_action": "drain-and-reset",
        "persistence": False,
        "compute_mode": "exclusive-process",
    }


def test_sixteen_gpus_and_all_that_joins_them_are_told_in_order(nvml: FakeNvml, asked: Asked) -> None:
    every = list(combinations(range(16), 2))
    nvml.set(
        [FakeGpu(used_bytes=index) for index in range(16)],
        nvlinks=[(0, 1)],
        p2p={(0, 2): (4, 0), (2, 3): (1, 2), (4, 5): (3, 5), (5, 6): (6, 7)},
        ancestors={(0, 1): 0, (0, 2): 10, (0, 3): 20, (0, 4): 30, (0, 6): 50, (0, 7): 7},
    )
    told = asked.details()["answer"]
    assert [(gpu["index"], gpu["memory_used_bytes"]) for gpu in told["gpus"]] == [(i, i) for i in range(16)]
    assert [(pair["one"], pair["other"]) for pair in told["pairs"]] == every
    pairs = {(pair.pop("one"), pair.pop("other")): tuple(pair.values()) for pair in told["pairs"]}
    assert {key: value for key, value in pairs.items() if value != ("node", False, "ok", "ok")} == {
        (0, 1): ("internal", True, "ok", "ok"),
        (0, 2): ("single", False, "disabled by the driver's settings", "ok"),
        (0, 3): ("multiple", False, "ok", "ok"),
        (0, 4): ("hostbridge", False, "ok", "ok"),
        (0, 6): ("system", False, "ok", "ok"),
        (0, 7): ("unknown-7", False, "ok", "ok"),
        (2, 3): ("node", False, "chipset not supported", "GPU not supported"),
        (4, 5): ("node", False, "topology not supported", "not supported"),
        (5, 6): ("node", False, None, None),
    }


@pytest.mark.parametrize("call", CALLS)
def test_what_a_gpu_does_not_tell_is_none_and_all_else_is_told(nvml: FakeNvml, asked: Asked, call: str) -> None:
    for code in (3, 4, 13, 999):  # not supported, no permission, no such function, and an error of this call alone
        nvml.set([FakeGpu()], [f"{call} error {code}"])
        assert gpus(asked) == [{**WELL, **dict.fromkeys(CALLS[call])}]


def test_an_older_driver_counts_its_reserve_as_used_and_says_that_it_cannot_tell(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(total_bytes=100, used_bytes=70, reserved_bytes=20)], ["nvmlDeviceGetMemoryInfo_v2 error 13"])
    (told,) = gpus(asked)
    assert [told[f"memory_{what}_bytes"] for what in ("used", "free", "reserved")] == [90, 10, None]


def test_what_joins_two_and_is_not_told_is_none(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu()] * 2, ["nvmlDeviceGetP2PStatus error 3", "nvmlDeviceGetTopologyCommonAncestor error 999"])
    nothing = {"path": None, "nvlink": None, "p2p_read": None, "p2p_write": None}
    assert asked.details()["answer"]["pairs"] == [{"one": 0, "other": 1, **nothing}]
    nvml.write("gpu 0\ngpu 1\nnvlink 0 1 status 6\n")
    assert asked.details()["answer"]["pairs"][0]["nvlink"] is None


def test_a_process_is_told_once_whatever_it_does(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(processes=((11, 5), (12, None)), graphics=((12, 7), (13, 6)))])
    assert gpus(asked)[0]["processes"] == [
        {"pid": 11, "used_bytes": 5, "kind": "compute"},
        {"pid": 12, "used_bytes": 7, "kind": "compute+graphics"},
        {"pid": 13, "used_bytes": 6, "kind": "graphics"},
    ]


def test_the_slices_of_mig_are_told_with_their_uuids(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(slices=(("MIG-a", 10), ("MIG-b", 20)), slice_used_bytes=3), FakeGpu()])
    sliced, whole = gpus(asked)
    assert (whole["mig"], whole["mig_slices"], sliced["mig"]) == (False, [], True)
    assert sliced["mig_slices"] == [
        {"index": 0, "uuid": "MIG-a", "memory_total_bytes": 10, "memory_used_bytes": 3},
        {"index": 1, "uuid": "MIG-b", "memory_total_bytes": 20, "memory_used_bytes": 0},
    ]
    nvml.set([FakeGpu(slices=(("MIG-a", 10),))], ["nvmlDeviceGetMaxMigDeviceCount error 3"])
    assert gpus(asked)[0]["mig_slices"] is None


def test_errors_of_memory_are_not_told_where_nobody_counts_them(nvml: FakeNvml, asked: Asked) -> None:
    nvml.set([FakeGpu(ecc=False)])
    (told,) = gpus(asked)
    assert (told["ecc"], told["ecc_uncorrected"]) == (False, None)


@pytest.mark.gpu
def test_real_gpus_tell_what_nvidia_smi_tells() -> None:
    try:
        told = asyncio.run(Gpus().details(PATIENCE_S))
    except GpusUnobserved as unobserved:
        pytest.skip(unobserved.reason)
    asked_for = "index,uuid,name,pci.bus_id,memory.total,persistence_mode,compute_mode,power.limit"
    query = ["nvidia-smi", f"--query-gpu={asked_for}", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    rows = [line.split(", ") for line in said.splitlines()]
    assert [
        [
            str(gpu.index),
            gpu.uuid,
            gpu.name,
            gpu.pci,
            str((gpu.memory_total_bytes or 0) >> 20),
            "Enabled" if gpu.persistence else "Disabled",
            (gpu.compute_mode or "").title().replace("-", "_"),
            f"{(gpu.power_limit_mw or 0) / 1000:.2f}",
        ]
        for gpu in told.gpus
    ] == rows
    assert [(pair.one, pair.other) for pair in told.pairs] == list(combinations(range(len(told.gpus)), 2))
    assert all(pair.path and pair.p2p_read and pair.p2p_write and pair.nvlink is not None for pair in told.pairs)
