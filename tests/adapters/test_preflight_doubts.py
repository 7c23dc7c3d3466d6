"""What says nothing of GPUs and transports, or only of a slow host, is never a verdict on them."""

from __future__ import annotations

import ast
import asyncio
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from mgpu_llm.adapters.preflight import Patience, Preflight
from mgpu_llm.adapters.preflight.program import PROBE
from mgpu_llm.core.preflight import AS_LAUNCHED
from tests.adapters.test_preflight import (
    HANGS,
    NO_P2P,
    TRANSPORTS,
    Fault,
    check,
    environment,
    gpus,
    preflight,
    works,
)

#: As PyTorch 2 puts NCCL's errors (torch/csrc/distributed/c10d/NCCLUtils.cpp), the last of which is NCCL's own last warning.
SMALL_SHM: Final = (
    "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\nLast error:\n"
    "Error while creating shared memory segment /dev/shm/nccl-kqTZxM (size 9637888), error: No space left on device (28)"
)
NO_INTERFACE: Final = (
    "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage\nncclInvalidUsage: This usually reflects invalid usage.\n"
    "Last error:\nBootstrap : no socket interface found"
)


def test_where_every_transport_hangs_and_the_time_is_short_nothing_is_known() -> None:
    checked = check(HANGS, deadline_s=0.8)
    assert checked.transports == ()
    assert checked.unobserved.endswith("in time") or checked.unobserved.endswith("when the time was over")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (
            {"at": "import", "do": "raise", "kind": "ImportError", "text": "libcudart.so.13"},
            "cannot import torch: libc",
        ),
        (
            {"at": "init", "do": "raise", "kind": "RuntimeError", "text": "CUDA error: initialization error"},
            "rank 0: CUDA",
        ),
        (
            {"at": "context", "do": "raise", "kind": "RuntimeError", "text": "CUDA error: odd"},
            "rank 0: CUDA error: odd",
        ),
        (
            {"at": "matmul", "do": "raise", "kind": "OutOfMemoryError", "text": "CUDA out of memory.", "gpu": 1},
            "rank 1: ",
        ),
        (
            {"at": "all_reduce", "do": "raise", "kind": "DistBackendError", "text": "Cuda failure 2 'out of memory'"},
            "rank 0: Cuda failure 2 'out of memory'",
        ),
        ({"at": "meet", "do": "raise", "kind": "DistStoreError", "text": "disk full", "gpu": 0}, "rank 0: disk full"),
        ({"at": "all_reduce", "do": "die", "number": 9, "gpu": 1}, "rank 1: ended by SIGKILL"),
        ({"at": "all_reduce", "do": "die", "number": 7, "gpu": 1}, "rank 1: ended by SIGBUS"),
        ({"at": "all_reduce", "do": "raise", "kind": "DistBackendError", "text": SMALL_SHM}, "rank 0: ncclSystemError"),
        (
            {"at": "all_reduce", "do": "raise", "kind": "DistBackendError", "text": NO_INTERFACE},
            "rank 0: ncclInvalidUsage: Bootstrap : no socket interface found",
        ),
    ],
    ids=[
        "no-torch",
        "driver",
        "all-alike",
        "no-memory",
        "no-memory-in-nccl",
        "no-meeting",
        "killed",
        "bus-error",
        "small-shm",
        "same-by-all-transports",
    ],
)
def test_what_says_nothing_of_gpus_and_transports_is_no_verdict_on_them(fault: Fault, why: str) -> None:
    checked = check(fault)
    assert (checked.transports, checked.gpus, checked.pairs) == ((), {}, {})
    assert checked.unobserved.startswith(why)


def test_a_driver_that_fails_one_rank_late_is_no_verdict_on_the_others_gpus() -> None:
    fails: Fault = {"at": "context", "do": "raise", "kind": "RuntimeError", "text": "CUDA error: unknown error"}
    checked = check({"at": "context", "do": "sleep", "s": 1.0, "gpu": 2}, fails, count=3)
    assert (checked.gpus, checked.unobserved) == ({}, "rank 0: CUDA error: unknown error")
    one = check({"at": "context", "do": "hang", "gpu": 1}, {**fails, "gpu": 0}, deadline_s=1.5)
    assert one.gpus == {}, "nobody has come through alone"


def test_gpus_that_cuda_does_not_see_are_no_verdict() -> None:
    assert check(more={"FAKE_TORCH_GPUS": "1"}).unobserved == "rank 0: CUDA sees 1 GPUs of 2"


def test_a_rank_without_memory_explains_the_error_of_another() -> None:
    closed: Fault = {
        "at": "all_reduce",
        "do": "raise",
        "kind": "DistBackendError",
        "text": "NCCL: peer closed",
        "gpu": 0,
    }
    late: Fault = {"at": "all_reduce", "do": "sleep", "s": 0.3, "gpu": 1}
    oom: Fault = {"at": "all_reduce", "do": "raise", "kind": "OutOfMemoryError", "text": "CUDA out of memory", "gpu": 1}
    checked = check(closed, late, oom)
    assert checked.transports == ()
    assert checked.unobserved == "rank 1: CUDA out of memory"


def test_a_start_that_is_slow_everywhere_is_no_hang() -> None:
    patience = Patience(others_s=0.05, floor_s=0.1, other_floor_s=0.1, grace_s=0.3)
    checked = check(
        {"at": "context", "do": "sleep", "s": 0.5, "gpu": 1},
        {"at": "all_reduce", "do": "sleep", "s": 0.15},
        patience=patience,
    )
    assert works(checked)[AS_LAUNCHED] is True


def test_a_host_that_stood_still_for_half_a_minute_is_no_hang() -> None:
    began = time.monotonic()

    def clock() -> float:
        now = time.monotonic()
        return now if now < began + 0.8 else now + 30.0

    patience = Patience(others_s=0.05, floor_s=5.0, grace_s=0.1)
    checking = Preflight(python=(sys.executable,), memory=None, key={}, deadline_s=90.0, clock=clock, patience=patience)
    slow: Fault = {"at": "all_reduce", "do": "sleep", "s": 0.6, "unless": NO_P2P}
    checked = asyncio.run(checking.check(gpus(2), environment(slow), TRANSPORTS))
    assert works(checked)[AS_LAUNCHED] is True


def test_a_gpu_that_never_becomes_ready_is_no_verdict() -> None:
    checked = check({"at": "context", "do": "hang", "gpu": 1}, deadline_s=1.0)
    assert (checked.transports, checked.gpus) == ((), {})
    assert checked.unobserved == "GPU 1 was not ready in time"


def test_a_flood_of_output_disturbs_nothing() -> None:
    flood: Fault = {
        "at": "context",
        "do": "print",
        "lines": 20_000,
        "text": '{"is": "passed", "group": "as-launched"}' * 3,
    }
    assert works(check(flood)) == {AS_LAUNCHED: True}


def test_secrets_that_an_error_repeats_are_hidden() -> None:
    fault: Fault = {"at": "import", "do": "raise", "kind": "ImportError", "text": "no module geheim-und-lang here"}
    checked = check(fault, more={"HF_TOKEN": "geheim-und-lang"})
    assert checked.unobserved == "cannot import torch: no module ... here"


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ((), "the engine's Python is not known"),
        (("/nowhere/python",), "cannot run '/nowhere/python': no such file or directory"),
        ((sys.executable, "-I"), "cannot import torch: No module named 'torch'"),
        (("/bin/false",), "the probe ended"),
    ],
    ids=["unknown", "missing", "no-torch", "no-python"],
)
def test_a_python_that_cannot_run_the_probe_is_no_verdict(python: tuple[str, ...], why: str) -> None:
    checked = asyncio.run(preflight(python=python).check(gpus(2), environment(), TRANSPORTS))
    assert (checked.transports, checked.unobserved) == ((), why)


def test_neither_the_folder_we_are_in_nor_that_of_the_probe_hides_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert works(check()) == {AS_LAUNCHED: True}


def test_the_probe_needs_python_3_9_and_pytorch_and_nothing_else() -> None:
    tree = ast.parse(PROBE.read_text(), feature_version=(3, 9))
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}
