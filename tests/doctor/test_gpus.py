"""What is said of GPUs, from what the real pynvml tells on a driver library made small."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.adapters import gpu_locks
from mgpu_llm.adapters.gpu_locks import Holder
from mgpu_llm.adapters.gpus import GpuDetails, GpuPair, GpuProcess, Gpus, HostGpus, MigSlice
from mgpu_llm.doctor import gpus
from mgpu_llm.doctor.finding import Finding
from mgpu_llm.doctor.gpus import Told
from tests.doctor.hosts import OPEN, Host, levels, named

WELL = GpuDetails(
    index=0,
    uuid="GPU-0",
    name="NVIDIA H200",
    pci="00000000:41:00.0",
    lost="",
    memory_total_bytes=140 << 30,
    memory_used_bytes=4 << 20,
    ecc=True,
    ecc_uncorrected=0,
    recovery_action="none",
    mig=False,
    compute_mode="default",
    persistence=True,
    processes=(),
)


def told(*found: GpuDetails, pairs: Sequence[GpuPair] = ()) -> Told:
    numbered = tuple(replace(gpu, index=index) for index, gpu in enumerate(found))
    host = HostGpus(driver="570.124.06", cuda="12.8", nvml="12.570.124.06", gpus=numbered, pairs=tuple(pairs))
    return Told(host=host, chosen=numbered)


def of(tmp_path: Path, *found: GpuDetails) -> list[Finding]:
    return list(gpus.check(Host(tmp_path).system, told(*found)))


def test_gpus_that_are_there_free_and_well_are_well(tmp_path: Path) -> None:
    found = of(tmp_path, WELL, WELL)
    assert levels(found) == {"gpus-present": "ok", "gpus-recovery": "ok", "gpus-ecc": "ok", "gpus-memory": "ok"}
    assert found[0].seen == "GPUs 0, 1 of 2: NVIDIA H200"


@pytest.mark.parametrize(
    ("ill", "name", "level", "cure"),
    [
        (replace(WELL, lost="GPU is lost (NVML error 15)"), "gpus-lost", "problem", "gpu-reset -i 1"),
        (replace(WELL, untold="no permission to ask it"), "gpus-lost", "unknown", "sudo"),
        (replace(WELL, recovery_action="reset"), "gpus-recovery", "problem", "gpu-reset -i 1"),
        (replace(WELL, recovery_action="reboot"), "gpus-recovery", "problem", "sudo reboot"),
        (replace(WELL, recovery_action="drain-p2p"), "gpus-recovery", "problem", "gpu-reset -i 1"),
        (replace(WELL, ecc_uncorrected=3), "gpus-ecc", "warning", "replace it"),
        (replace(WELL, mig=True, mig_slices=()), "gpus-mig", "problem", "sudo nvidia-smi -i 1 -mig 0"),
        (replace(WELL, compute_mode="prohibited"), "gpus-compute-mode", "problem", "-i 1 -c DEFAULT"),
        (replace(WELL, compute_mode="exclusive-process"), "gpus-compute-mode", "warning", "-i 1 -c DEFAULT"),
        (replace(WELL, persistence=False), "gpus-persistence", "warning", "sudo nvidia-smi -pm 1"),
        (replace(WELL, name="NVIDIA L4"), "gpus-alike", "warning", "gpus.use"),
        (replace(WELL, memory_used_bytes=60 << 30), "gpus-memory", "warning", "fuser -v /dev/nvidia1"),
        (replace(WELL, memory_used_bytes=None), "gpus-memory", "unknown", ""),
    ],
)
def test_a_gpu_that_is_ill_is_named_with_its_cure(
    tmp_path: Path, ill: GpuDetails, name: str, level: str, cure: str
) -> None:
    finding = named(of(tmp_path, WELL, ill), name)
    assert finding.level == level
    assert cure in finding.fix


class Driver(Gpus):
    """Tells of two GPUs, of which the second has three slices."""

    def __init__(self) -> None:
        pass

    async def details(self, deadline_s: float = 4) -> HostGpus:  # noqa: ARG002 - the signature is its parent's
        slices = tuple(
            MigSlice(index=at, uuid=f"MIG-{at}", memory_total_bytes=20 << 30, memory_used_bytes=at << 30)
            for at in range(3)
        )
        divided = replace(
            WELL,
            index=1,
            uuid="GPU-1",
            mig=True,
            mig_slices=slices,
            processes=(GpuProcess(pid=1, used_bytes=9, kind="compute"),),
        )
        return HostGpus(driver=None, cuda=None, nvml=None, gpus=(WELL, divided), pairs=())


def test_a_slice_is_well_with_its_own_memory_unless_vllm_takes_its_number_for_a_gpus(tmp_path: Path) -> None:
    system = Host(tmp_path).system
    fine = asyncio.run(gpus.ask(Driver(), ["MIG-1"]))
    assert (fine.sizes, fine.pairs) == ((20 << 30,), [])
    found = list(gpus.check(system, fine))
    assert levels(found) == dict.fromkeys(
        ["gpus-present", "gpus-recovery", "gpus-ecc", "gpus-slice", "gpus-memory"], "ok"
    )
    assert named(found, "gpus-slice").seen == "MIG-1 is slice 1 of GPU 1"
    beyond = list(gpus.check(system, asyncio.run(gpus.ask(Driver(), ["MIG-0"], ["MIG-2"]))))
    odd = [finding for finding in beyond if finding.name == "gpus-slice" and finding.level == "warning"]
    assert [finding.seen[:28] for finding in odd] == ["MIG-2 is slice 2 of GPU 1, a"]
    assert named(beyond, "gpus-memory").seen.startswith("GPU 1: 2.0 GiB of 20 GiB taken")
    whole = named(list(gpus.check(system, asyncio.run(gpus.ask(Driver(), [1])))), "gpus-mig")
    assert whole.seen == "GPU 1 is in MIG mode, with 3 slices, and cannot be used as a whole"
    assert 'no MIG slice "MIG-f"' in asyncio.run(gpus.ask(Driver(), ["MIG-f"])).misnamed


def test_what_a_driver_does_not_tell_is_no_cause_for_a_word(tmp_path: Path) -> None:
    silent = replace(WELL, ecc=None, ecc_uncorrected=None, recovery_action=None, compute_mode=None, persistence=None)
    assert levels(of(tmp_path, silent)) == {"gpus-present": "ok", "gpus-memory": "ok"}


def test_who_has_memory_is_told_with_user_command_and_size_and_without_secrets(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/proc/71/cmdline", "python\0train.py\0--api-key\0sk-very-secret\0")
    taken = replace(
        WELL,
        memory_used_bytes=30 << 30,
        processes=(
            GpuProcess(pid=71, used_bytes=30 << 30, kind="compute"),
            GpuProcess(pid=72, used_bytes=None, kind="compute"),
        ),
    )
    (warning,) = (finding for finding in gpus.check(host.system, told(taken)) if finding.name == "gpus-memory")
    user = "root" if os.geteuid() == 0 else ""
    assert warning.seen.startswith("GPU 0: 30 GiB of 140 GiB taken, by pid 71 (")
    assert user in warning.seen
    assert "30 GiB): python train.py --api-key" in warning.seen
    assert "pid 72: not to be seen from here" in warning.seen
    assert "very-secret" not in warning.seen
    assert warning.fix == "sudo kill 71; or name other GPUs in gpus.use"


@pytest.mark.parametrize(
    ("files", "kind", "fix"),
    [
        ({"/proc/71/status": "PPid:\t70\n", "/proc/70/cmdline": "python\0/usr/local/bin/mgpud\0"}, "compute", "stop the mgpud"),
        ({"/proc/71/status": "PPid:\t70\n", "/proc/70/status": "PPid:\t1\n"}, "compute", "sudo kill 71;"),
        ({"/proc/71/status": "PPid:\t71\n"}, "compute", "sudo kill 71;"),
        ({"/proc/71/status": "", "/.dockerenv": ""}, "compute", "end these where they run"),
        ({"/proc/71/status": ""}, "graphics", "sudo systemctl isolate"),
        ({}, "compute", "or name other GPUs"),
    ],
)  # fmt: skip
def test_nobody_is_told_to_kill_an_engine_a_desktop_or_somebody_elses_number(
    tmp_path: Path, files: dict[str, str], kind: str, fix: str
) -> None:
    host = Host(tmp_path)
    for name, content in files.items():
        host.has(name, content)
    taken = replace(WELL, processes=(GpuProcess(pid=71, used_bytes=1 << 30, kind=kind),))
    assert named(list(gpus.check(host.system, told(taken))), "gpus-memory").fix.startswith(fix)


def test_a_driver_that_is_loaded_and_silent_is_a_problem(tmp_path: Path) -> None:
    host = Host(tmp_path)
    silent = Told(silence="the NVIDIA driver has not answered for 12 s")
    assert list(gpus.check(host.system, silent)) == []
    host.has("/proc/driver/nvidia/version", OPEN)
    (problem,) = gpus.check(host.system, silent)
    assert (problem.level, problem.seen) == ("problem", silent.silence)
    assert "dmesg" in problem.fix


def test_names_that_no_gpu_has_are_a_problem(tmp_path: Path) -> None:
    (problem,) = gpus.check(Host(tmp_path).system, replace(told(WELL), chosen=(), misnamed="no GPU 7: this host has 0"))
    assert (problem.name, problem.seen) == ("gpus-present", "gpus.use or gpus.spares: no GPU 7: this host has 0")


def test_a_driver_without_gpus_is_a_problem(tmp_path: Path) -> None:
    (problem,) = gpus.check(Host(tmp_path).system, told())
    assert problem.level == "problem"


def test_only_pairs_of_the_gpus_that_are_meant_count() -> None:
    both = {"p2p_read": "ok", "p2p_write": "ok"}
    found = told(
        WELL,
        WELL,
        WELL,
        pairs=[
            GpuPair(one=0, other=1, nvlink=True, **both),
            GpuPair(one=0, other=2, nvlink=False, **both),
            GpuPair(one=1, other=2, nvlink=False, p2p_read="ok", p2p_write="chipset not supported"),
        ],
    )
    assert [(pair.name, pair.how, pair.why) for pair in found.pairs] == [
        ("0-1", "nvlink", ""),
        ("0-2", "pcie", ""),
        ("1-2", "none", "chipset not supported"),
    ]
    two = replace(found, chosen=found.chosen[:1] + found.chosen[2:])
    assert [pair.name for pair in two.pairs] == ["0-2"]
    untold = told(WELL, WELL, pairs=[GpuPair(one=0, other=1)])
    assert [pair.how for pair in untold.pairs] == ["unknown"]


def test_a_spare_that_is_ill_is_told_too(tmp_path: Path) -> None:
    both = told(WELL, replace(WELL, lost="GPU is lost (NVML error 15)"))
    found = list(gpus.check(Host(tmp_path).system, replace(both, chosen=both.chosen[:1], spares=both.chosen[1:])))
    assert named(found, "gpus-lost").seen.startswith("GPU 1: ")


def test_a_gpu_that_another_instance_has_reserved_is_a_problem_unless_both_share(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for mine, theirs, problems in ((False, False, 1), (True, True, 0), (True, False, 1)):
        holder = Holder(pid=os.getpid(), user="alice", runtime_dir=str(other), shared=theirs)
        with gpu_locks.held([tmp_path], ["GPU-0"], holder):
            found = list(gpus.reserved(told(WELL), [tmp_path], own, shared=mine))
            assert [finding.level for finding in found] == ["problem"] * problems
            assert all(f"pid {os.getpid()}, user alice" in finding.seen for finding in found)
            assert list(gpus.reserved(told(WELL), [tmp_path], other, shared=mine)) == []
    assert list(gpus.reserved(told(WELL), [tmp_path], own, shared=False)) == []


def test_sizes_are_told_of_all_gpus_or_of_none() -> None:
    assert told(WELL, WELL).sizes == (140 << 30, 140 << 30)
    assert told(WELL, replace(WELL, memory_total_bytes=None)).sizes is told().sizes is None


def test_without_a_driver_library_nothing_is_told_and_why() -> None:

    silent = asyncio.run(gpus.ask(Gpus(), "all"))
    if silent.host is not None:
        pytest.skip("this host has GPUs")
    assert (silent.driver, silent.cuda, silent.pairs) == ("", "", [])
    assert "NVML" in silent.silence
