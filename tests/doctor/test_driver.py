"""Driver, CUDA and Fabric Manager, from the files that a host shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mgpu_llm.adapters.host.program import Unanswered
from mgpu_llm.doctor import cuda, driver, fabric
from tests.doctor.hosts import MODULES, NOUVEAU, OPEN, PROPRIETARY, SWITCH, Host, levels, named

LIBRARY = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so."


@pytest.mark.parametrize(
    ("text", "version", "is_open"),
    [(PROPRIETARY, "535.161.08", False), (OPEN, "570.124.06", True)],
    ids=["closed", "open"],
)
def test_the_kernel_module_tells_its_version_and_whose_it_is(text: str, version: str, is_open: bool) -> None:
    assert driver.module(text) == driver.Module(version=version, open_source=is_open)


def test_what_is_no_version_file_tells_nothing() -> None:
    assert driver.module("") is driver.module("NVRM version: something else\n") is None


def test_a_driver_whose_parts_are_of_one_version_is_well(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/proc/driver/nvidia/version", OPEN)
    host.has("/proc/modules", MODULES)
    host.has(
        "/proc/driver/nvidia/gpus/0000:41:00.0/information", "Model: \t\t NVIDIA H200\nGPU Firmware: \t 570.124.06\n"
    )
    host.has(f"{LIBRARY}570.124.06")
    host.has("/usr/lib/x86_64-linux-gnu/libcuda.so.1")
    found = list(driver.check(host.system, wanted=True))
    assert levels(found) == {"driver-module": "ok", "driver-library": "ok"}
    assert found[0].seen == "open kernel module 570.124.06, GSP firmware 570.124.06"


def test_a_library_of_another_version_than_the_module_is_a_problem_until_the_module_is_loaded_anew(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path)
    host.has("/proc/driver/nvidia/version", PROPRIETARY)
    host.has(f"{LIBRARY}550.54.15")
    problem = named(list(driver.check(host.system, wanted=True)), "driver-library")
    assert problem.level == "problem"
    assert "550.54.15, the loaded module 535.161.08" in problem.seen
    assert "rmmod nvidia_uvm" in problem.fix


def test_a_container_that_was_given_no_computing_lacks_cudas_library(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/.dockerenv")
    host.has("/proc/driver/nvidia/version", OPEN)
    host.has(f"{LIBRARY}570.124.06")
    problem = named(list(driver.check(host.system, wanted=True)), "driver-cuda-library")
    assert (problem.level, "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in problem.fix) == ("problem", True)


def test_libraries_in_an_unknown_place_are_not_known(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/proc/driver/nvidia/version", PROPRIETARY)
    assert named(list(driver.check(host.system, wanted=True)), "driver-library").level == "unknown"


def test_nouveau_in_the_drivers_place_is_to_be_kept_from_loading(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/proc/modules", NOUVEAU)
    (problem,) = driver.check(host.system, wanted=True)
    assert (problem.level, "nouveau" in problem.seen) == ("problem", True)
    assert "blacklist nouveau" in problem.fix


def test_nouveau_beside_the_driver_is_a_warning(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/proc/driver/nvidia/version", PROPRIETARY)
    host.has("/proc/modules", MODULES + NOUVEAU)
    assert named(list(driver.check(host.system, wanted=True)), "driver-nouveau").level == "warning"


def test_gpus_without_a_loaded_driver_want_it_loaded(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has_gpu("0000:41:00.0")
    host.has_gpu("0000:61:00.0")
    (problem,) = driver.check(host.system, wanted=True)
    assert "2 NVIDIA GPUs on the PCI bus (0000:41:00.0, 0000:61:00.0)" in problem.seen
    assert problem.fix.startswith("sudo modprobe nvidia-uvm")


def test_a_host_without_gpus_is_told_how_to_do_without(tmp_path: Path) -> None:
    (problem,) = driver.check(
        Host(tmp_path).system, wanted=True, silence="cannot list the GPUs: no library; install it"
    )
    assert problem.seen == "no NVIDIA driver, and no NVIDIA GPU on the PCI bus (cannot list the GPUs: no library)"
    assert 'gpus.use = "none"' in problem.fix


def test_a_container_without_a_driver_was_started_without_gpus(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/.dockerenv")
    (problem,) = driver.check(host.system, wanted=True)
    assert problem.fix.startswith("docker run --gpus all")


def test_who_wants_no_gpus_needs_no_driver(tmp_path: Path) -> None:
    (fine,) = driver.check(Host(tmp_path).system, wanted=False)
    assert fine.level == "ok"


def test_a_driver_that_only_nvml_tells_of_is_there(tmp_path: Path) -> None:
    (fine,) = driver.check(Host(tmp_path).system, wanted=True, told="570.124.06")
    assert (fine.level, "570.124.06" in fine.seen) == ("ok", True)


@pytest.mark.parametrize(
    ("version", "supports", "built", "level"),
    [
        ("570.124.06", "12.8", "12.8", "ok"),
        ("580.65.06", "13.0", "12.8", "ok"),  # a newer driver runs what is older
        ("535.161.08", "12.2", "12.8", "warning"),  # within a major version it runs, but compiles no PTX
        ("525.60.13", "12.0", "12.0", "ok"),
        ("525.60.11", "12.0", "12.1", "problem"),
        ("570.124.06", "12.8", "13.0", "problem"),
        ("470.223.02", "11.4", "11.8", "warning"),
        ("450.80.02", "11.0", "12.1", "problem"),
        ("570.124.06", "", "12.8", "ok"),
        ("570.124.06", "12.8", "14.1", "unknown"),
        ("570.124.06", "12.8", "", "unknown"),
        ("", "", "12.8", "unknown"),
    ],
)
def test_the_driver_is_held_against_the_cuda_of_the_engines_pytorch(
    version: str, supports: str, built: str, level: str
) -> None:
    assert cuda.check(version, supports, built, "2.9.0").level == level


def test_a_driver_that_is_too_old_is_told_with_the_oldest_that_would_do() -> None:
    problem = cuda.check("570.124.06", "12.8", "13.0", "2.11.0+cu130")
    assert problem.seen == (
        "driver 570.124.06 (CUDA 12.8), PyTorch 2.11.0+cu130 built for CUDA 13.0: CUDA 13.x needs driver 580.65.06 or later"
    )
    assert "VLLM_ENABLE_CUDA_COMPATIBILITY=1" in problem.fix
    assert cuda.check("570.124.06", "12.8", "13.0", "2.11.0", compatibility=True).level == "warning"


def answers(state: str, version: str) -> Callable[[Sequence[str]], str]:
    def run(argv: Sequence[str]) -> str:
        if argv[0] == "systemctl":
            return f"{state}\n"
        if not version:
            raise Unanswered("there is no nv-fabricmanager")
        return f"Fabric Manager version is : {version}\n"

    return run


@pytest.mark.parametrize(
    ("state", "version", "told"),
    [
        ("active", "570.124.06", {"fabric-manager": "ok", "fabric-version": "ok"}),
        ("active", "550.54.15", {"fabric-manager": "ok", "fabric-version": "problem"}),
        ("inactive", "570.124.06", {"fabric-manager": "problem", "fabric-version": "ok"}),
        ("inactive", "", {"fabric-manager": "problem", "fabric-version": "unknown"}),
    ],
)
def test_an_nvswitch_needs_its_fabric_manager_in_the_drivers_version(
    tmp_path: Path, state: str, version: str, told: dict[str, str]
) -> None:
    host = Host(tmp_path)
    host.has("/dev/nvidia-nvswitch0")
    host.has("/dev/nvidia-nvswitchctl")
    assert levels(list(fabric.check(host.system, "570.124.06", answers(state, version)))) == told


def test_switches_are_known_by_their_pci_class_too_and_a_container_does_not_see_their_manager(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has_gpu("0000:05:00.0", kind=SWITCH)
    host.has("/.dockerenv")
    (unknown,) = fabric.check(host.system, "570.124.06", answers("active", ""))
    assert (unknown.level, "NVSwitches: 1" in unknown.seen) == ("unknown", True)


def test_without_a_switch_nobody_is_asked_for_a_fabric_manager(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has_gpu()
    assert list(fabric.check(host.system, "570.124.06", answers("inactive", ""))) == []
