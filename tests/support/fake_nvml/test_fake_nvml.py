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
    "mig": said("nvmlDeviceGetMigMode", d),
    "p2p": [said("nvmlDeviceGetP2PStatus", d, d, n.NVML_P2P_CAPS_INDEX_NVLINK),
            said("nvmlDeviceGetP2PStatus", d, n.nvmlDeviceGetHandleByIndex(0), n.NVML_P2P_CAPS_INDEX_NVLINK),
            said("nvmlDeviceGetP2PStatus", d, d, n.NVML_P2P_CAPS_INDEX_PCI)],
    "compute_mode": said("nvmlDeviceGetComputeMode", d),
    "old_processes": [p.pid for p in said("nvmlDeviceGetComputeRunningProcesses_v2", d)],
    "graphics": said("nvmlDeviceGetGraphicsRunningProcesses", d),
    "faulty": [said("nvmlDeviceGetName", n.nvmlDeviceGetHandleByIndex(i)) for i in range(2)],
    "shut_down": [said("nvmlShutdown"), said("nvmlDeviceGetCount"), said("nvmlDeviceGetName", d), said("nvmlShutdown")],
}
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.getbasetemp())


@pytest.fixture
def nvml(tmp_path: Path, library: Path) -> FakeNvml:
    return FakeNvml(tmp_path, library)


def run(nvml: FakeNvml) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=nvml.environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_the_real_pynvml_gets_every_answer_the_control_file_gives(nvml: FakeNvml) -> None:
    nvml.write(
        "# two GPUs\n\ndriver 580.1.2\ncuda 13000\ngpu 0\n"
        "gpu 1 pci 00000000:A1:00.0 total 100 used 7 reserved 3 temperature 61 proc 41 5 proc 42 unknown name L 4\n"
        "nvlink 0 1 status 4\nfault nvmlDeviceGetName error 15 gpu 0\n"
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
        "mig": [0, 0],
        "p2p": [5, 4, 2],
        "compute_mode": 0,
        "old_processes": [41, 42],
        "graphics": [],
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
        ("fault nvmlInit blocks", 'fault: "blocks" is neither "error" nor "block"'),
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
        "gpu 3 total 9 used 1 reserved 0 util 0 power 75000 proc 5 unknown proc 6 7 uuid GPU-x lost name NVIDIA L4"
    )


def test_a_library_is_built_once_for_one_source(tmp_path: Path) -> None:
    first = build(tmp_path)
    (made,) = first.iterdir()
    made_at_ns = made.stat().st_mtime_ns
    assert build(tmp_path) == first
    assert made.stat().st_mtime_ns == made_at_ns
