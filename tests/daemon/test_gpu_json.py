"""Who uses the GPUs, as one document."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mgpu_llm import gpu_json
from mgpu_llm.adapters.gpus import GpuDetails, GpuProcess, Gpus, HostGpus, MigSlice, owner
from mgpu_llm.core.redaction import HIDDEN
from mgpu_llm.gpu_json import GpuReport
from tests.ctl.daemons import wait_for


class OneGpu(Gpus):
    """A host whose one GPU is used by `pids`."""

    def __init__(self, *pids: int, uuid: str | None = "GPU-a", slices: tuple[MigSlice, ...] | None = None) -> None:
        self._pids = pids
        self._uuid = uuid
        self._slices = slices

    async def details(self, deadline_s: float = 4) -> HostGpus:  # noqa: ARG002 - the signature is its parent's
        processes = tuple(GpuProcess(pid=pid, used_bytes=1, kind="compute") for pid in self._pids)
        gpu = GpuDetails(
            index=0, uuid=self._uuid, name=None, pci=None, lost="", processes=processes, mig_slices=self._slices
        )
        return HostGpus(driver=None, cuda=None, nvml=None, gpus=(gpu,), pairs=())


def commands(report: GpuReport) -> list[str | None]:
    document = asyncio.run(report.document(1))
    return [process["command"] for process in document["gpus"][0]["processes"]]


def test_a_command_is_told_without_its_secrets_and_not_in_all_its_length() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, "--api-key", "s3cret", "--long", "x" * 1000]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (told,) = commands(GpuReport(OneGpu(child.pid)))
        child.communicate()
    assert told is not None
    assert "s3cret" not in told
    assert f"--api-key {HIDDEN}" in told
    assert len(told) == gpu_json.MOST_CHARACTERS


def test_missing_is_what_the_config_names_and_the_driver_does_not_unless_a_gpu_has_no_name() -> None:
    def missing(uuid: str | None) -> list[str]:
        document = asyncio.run(GpuReport(OneGpu(uuid=uuid)).document(1, configured=["GPU-b", "GPU-a"]))
        assert isinstance(document["missing"], list)
        return document["missing"]

    assert missing("GPU-a") == ["GPU-b"]
    assert missing(None) == []


def test_a_gpu_that_does_not_tell_its_uuid_is_the_configs_by_its_index() -> None:
    for named, expected in (("0", True), ("1", False)):
        document = asyncio.run(GpuReport(OneGpu(uuid=None)).document(1, configured=[named]))
        assert (document["gpus"][0]["configured"], document["missing"]) == (expected, [])
    document = asyncio.run(GpuReport(OneGpu()).document(1, configured=["0", "GPU-a"]))
    assert document["missing"] == [], "back, it is still the one of that index"


def test_a_slice_of_the_config_is_marked_with_its_gpu_and_is_not_missing() -> None:
    slices = tuple(
        MigSlice(index=at, uuid=name, memory_total_bytes=5, memory_used_bytes=1)
        for at, name in enumerate(["MIG-a", "MIG-b", None])
    )
    document = asyncio.run(
        GpuReport(OneGpu(slices=slices)).document(1, configured=["MIG-a", "MIG-b"], in_use=["MIG-a"])
    )
    (gpu,) = document["gpus"]
    assert (gpu["configured"], gpu["in_use"], document["missing"]) == (True, True, [])
    assert [(part["configured"], part["in_use"]) for part in gpu["mig_slices"]] == [
        (True, True),
        (True, False),
        (False, False),
    ]
    (other,) = asyncio.run(GpuReport(OneGpu(slices=slices)).document(1, configured=["GPU-b"]))["gpus"]
    assert (other["configured"], other["in_use"]) == (False, False)


def test_a_process_that_is_stuck_is_told_by_its_name_and_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "PROC", tmp_path)
    monkeypatch.setattr(gpu_json, "OWNERS_S", 1.5)
    for pid in (7, 8):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / f"{pid}/status").write_text(f"Name:\tworker{pid}\nUid:\t{os.getuid()}\t0\t0\t0\n")
    os.mkfifo(tmp_path / "7/cmdline")  # whose reader waits, as for the memory of a process that is stuck
    (tmp_path / "8/cmdline").write_bytes(b"python\0-x\0")
    report = GpuReport(OneGpu(7, 8))
    assert commands(report) == ["worker7", "python -x"]
    waiting = threading.active_count()
    assert commands(report) == ["worker7", "python -x"]
    # Of those that are not stuck one waits for more, the others end.
    wait_for(lambda: threading.active_count() <= waiting, "that no more threads wait for it")
    (tmp_path / "7/cmdline").write_bytes(b"torchrun\0")  # to the reader that waits; there is none for what follows
    (tmp_path / "7/cmdline").unlink()
    (tmp_path / "7/cmdline").write_bytes(b"torchrun\0")
    wait_for(lambda: commands(report)[0] == "torchrun", "that it is asked again once it has answered")
