"""The fake driver itself, through the real pynvml: what the adapter does not ask yet, and the control file."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_nvml import FakeGpu, FakeNvml, build

SCRIPT = """
import json, sys
import pynvml as n
n.nvmlInit()
d = n.nvmlDeviceGetHandleByIndex(1)
def said(ask, *arguments):
    try:
        return getattr(n, ask)(*arguments)
    except n.NVMLError as error:
        return error.value
answers = {
    "driver": said("nvmlSystemGetDriverVersion"),
    "nvml": said("nvmlSystemGetNVMLVersion"),
    "cuda": [said("nvmlSystemGetCudaDriverVersion"), said("nvmlSystemGetCudaDriverVersion_v2")],
    "count": said("nvmlDeviceGetCount"),
    "minor": said("nvmlDeviceGetMinorNumber", d),
    "pci": [said("nvmlDeviceGetPciInfo", d).busId, said("nvmlDeviceGetPciInfo", d).bus],
    "by_pci": said("nvmlDeviceGetIndex", said("nvmlDeviceGetHandleByPciBusId", "00000000:a1:00.0")),
    "beyond": said("nvmlDeviceGetHandleByIndex", 2),
    "free": [said("nvmlDeviceGetMemoryInfo", d).free, said("nvmlDeviceGetMemoryInfo", d, n.nvmlMemory_v2).free],
    "reserved": said("nvmlDeviceGetMemoryInfo", d, n.nvmlMemory_v2).reserved,
    "wrong_version": said("nvmlDeviceGetMemoryInfo", d, 1),
    "temperature": said("nvmlDeviceGetTemperature", d, n.NVML_TEMPERATURE_GPU),
    "power_limit": said("nvmlDeviceGetEnforcedPowerLimit", d),
    "persistence": said("nvmlDeviceGetPersistenceMode", d),
    "ecc": [said("nvmlDeviceGetEccMode", d), said("nvmlDeviceGetTotalEccErrors", d, 1, 0),
            said("nvmlDeviceGetTotalEccErrors", d, 0, 0),
            said("nvmlDeviceGetTotalEccErrors", n.nvmlDeviceGetHandleByIndex(0), 1, 0)],
    "recovery": [(f.nvmlReturn, f.value.uiVal) for f in n.nvmlDeviceGetFieldValues(d, [230, 1])],
    "mig": [said("nvmlDeviceGetMigMode", n.nvmlDeviceGetHandleByIndex(i)) for i in range(2)],
    "slice": [said("nvmlDeviceGetMaxMigDeviceCount", d), said("nvmlDeviceGetMigDeviceHandleByIndex", d, 1),
              said("nvmlDeviceGetUUID", n.nvmlDeviceGetMigDeviceHandleByIndex(d, 0)),
              *(said("nvmlDeviceGetMemoryInfo", n.nvmlDeviceGetMigDeviceHandleByIndex(d, 0), v).total
                for v in (None, n.nvmlMemory_v2))],
    "p2p": [said("nvmlDeviceGetP2PStatus", d, d, n.NVML_P2P_CAPS_INDEX_NVLINK),
            said("nvmlDeviceGetP2PStatus", d, n.nvmlDeviceGetHandleByIndex(0), n.NVML_P2P_CAPS_INDEX_NVLINK),
            said("nvmlDeviceGetP2PStatus", d, d, n.NVML_P2P_CAPS_INDEX_PCI),
            *(said("nvmlDeviceGetP2PStatus", n.nvmlDeviceGetHandleByIndex(0), d, kind) for kind in (0, 1))],
    "ancestor": said("nvmlDeviceGetTopologyCommonAncestor", d, n.nvmlDeviceGetHandleByIndex(0)),
    "compute_mode": said("nvmlDeviceGetComputeMode", d),
    "old_processes": [p.pid for p in said("nvmlDeviceGetComputeRunningProcesses_v2", d)],
    "graphics": [p.pid for p in said("nvmlDeviceGetGraphicsRunningProcesses", d)],
    "faulty": [said("nvmlDeviceGetName", n.nvmlDeviceGetHandleByIndex(i)) for i in range(2)],
    "shut_down": [said("nvmlShutdown"), said("nvmlDeviceGetCount"), said("nvmlDeviceGetName", d), said("nvmlShutdown")],
}
json.dump(answers, sys.stdout)
"""


def run(nvml: FakeNvml) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=nvml.environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_the_real_pynvml_gets_every_answer_the_control_file_gives(nvml: FakeNvml) -> None:
    nvml.write(
        "# two GPUs\n\ndriver 580.1.2\ncuda 13000\ngpu 0 ecc 0\n"
        "gpu 1 pci 00000000:A1:00.0 total 100 used 7 reserved 3 temperature 61 proc 41 5 proc 42 unknown "
        "graphics 43 1 limit 300 persistence 0 ecc-errors 2 recovery 4 compute-mode 3 slice MIG-a 50 name L 4\n"
        "nvlink 0 1 status 4\np2p 1 0 write 5\nancestor 0 1 20\nfault nvmlDeviceGetName error 15 gpu 0\n"
    )
    ran = run(nvml)
    assert ran.stderr == ""
    answers: dict[str, Any] = json.loads(ran.stdout)
    assert answers == {
        "driver": "580.1.2",
        "nvml": "13.580.1.2",
        "cuda": [13000, 13000],
        "count": 2,
        "minor": 1,
        "pci": ["00000000:A1:00.0", 0xA1],
        "by_pci": 1,
        "beyond": 2,
        "free": [90, 90],
        "reserved": 3,
        "wrong_version": 25,
        "temperature": 61,
        "power_limit": 300,
        "persistence": 0,
        "ecc": [[1, 1], 2, 2, 3],
        "recovery": [[0, 4], [3, 0]],
        "mig": [[0, 0], [1, 1]],
        "slice": [7, 6, "MIG-a", 50, 50],
        "p2p": [5, 4, 2, 0, 5],
        "ancestor": 20,
        "compute_mode": 3,
        "old_processes": [41, 42],
        "graphics": [43],
        "faulty": [15, "L 4"],
        "shut_down": [None, 1, 1, 1],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gpus 4", 'unknown line "gpus"'),
        ("gpu 0 usde 5", 'gpu: unknown key "usde"'),
        ("gpu 0 used 5GB", '"used 5GB" is not a number'),
        ("gpu 0 used", '"used" has no value'),
        ("gpu 16", "gpu 16: at most 16"),
        ("gpu 0\ngpu 2", "gpu 2 is given, gpu 1 is not"),
        ("gpu 0\nnvlink 0 1", "nvlink 0 1: no two GPUs above"),
        ("gpu 0\ngpu 1\nnvlink 0 1 6", 'nvlink: unknown key "6"'),
        ("gpu 0\ngpu 1\np2p 0 1 status 6", 'p2p: unknown key "status"'),
        ("gpu 0\nancestor 0 0 50", "ancestor 0 0: no two GPUs above"),
        ("gpu 0 recovery reset", '"recovery reset" is not a number'),
        ("fault nvmlInit blocks", 'fault: "blocks" is neither "error" nor "block" nor "slow"'),
        ("fault nvmlInit block 1", 'fault: unknown key "1"'),
    ],
)
def test_a_control_file_that_cannot_be_understood_ends_the_process(nvml: FakeNvml, text: str, complaint: str) -> None:
    nvml.write(text)
    ran = run(nvml)
    assert ran.returncode == -signal.SIGABRT
    assert ran.stderr.startswith(f"fake_nvml: {complaint}\n")


def test_a_gpu_says_what_its_line_says(nvml: FakeNvml) -> None:
    gpu = FakeGpu(name="NVIDIA L4", uuid="GPU-x", total_bytes=9, used_bytes=1, processes=((5, None), (6, 7)), lost=True)
    assert gpu.line(3) == (
        "gpu 3 total 9 used 1 reserved 0 util 0 power 75000 limit 700000 temperature 30 ecc 1 ecc-errors 0 persistence 1 "
        "compute-mode 0 recovery 0 proc 5 unknown proc 6 7 uuid GPU-x lost name NVIDIA L4"
    )


def test_one_gpu_changes_and_all_else_stays(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.set([FakeGpu(), FakeGpu()], ["nvmlInit block"], nvlinks=[(0, 1)], p2p={(0, 1): (4, 0)}, ancestors={(0, 1): 50})
    nvml.change(1, recovery=None, graphics=((9, 8),), slices=(("MIG-a", 7),), reset_required=True)
    changed = FakeGpu(recovery=None, graphics=((9, 8),), slices=(("MIG-a", 7),), reset_required=True)
    lines = (tmp_path / "nvml-control").read_text().splitlines()
    assert lines[:2] == [FakeGpu().line(0), changed.line(1)]
    assert " recovery unknown graphics 9 8 slice MIG-a 7 reset-required " in lines[1]
    assert lines[2:] == ["nvlink 0 1", "p2p 0 1 read 4 write 0", "ancestor 0 1 50", "fault nvmlInit block"]


def test_a_library_is_built_once_for_one_source(tmp_path: Path) -> None:
    first = build(tmp_path)
    (made,) = first.iterdir()
    made_at_ns = made.stat().st_mtime_ns
    assert build(tmp_path) == first
    assert made.stat().st_mtime_ns == made_at_ns
