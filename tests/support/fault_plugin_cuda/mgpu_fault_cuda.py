"""A vLLM plugin that breaks a healthy engine on NVIDIA GPUs on purpose, so that a supervisor can be tried on a real one.

With this folder on PYTHONPATH vLLM loads it in every engine process (entry point group "vllm.general_plugins"); it does
nothing unless MGPU_FAULT is set:

p2p-hang                The fabric drops what one rank writes into another's memory: rank 1's GPU sleeps for ever before the
                        first all-reduce of NCCL, in distributed init, so every GPU spins. NCCL_P2P_DISABLE=1 cures it.
rank-missing            Rank 1 leaves that all-reduce out, so rank 0 waits for it in NCCL's setup, its GPU idle.
                        NCCL_P2P_DISABLE=1 cures it.
custom-all-reduce-hang  Rank 1's GPU sleeps for ever before the first all-reduce that vLLM's own kernels carry out, so the
                        other GPUs spin in that kernel. --disable-custom-all-reduce cures it.

Made for vLLM 0.26.0 with tensor parallel 2; seen on two H100s. NCCL's first all-reduce is the warm-up at the end of
PyNcclCommunicator's making. vLLM's own kernels take over for tensors of less than 8 MB: not in the profiling run, which is
larger; while graphs are captured they are only recorded; so the first that runs is in the warm-up after the capture, by a
call if its batch is larger than the largest graph (on an H100 a decode of 1024 requests), else by a replay.
"""

import importlib
import os
from typing import Any

FAULTS = ("p2p-hang", "rank-missing", "custom-all-reduce-hang")
VICTIM = 1
#: Clock cycles: centuries.
FOR_EVER = 1 << 60


def register() -> None:
    """Arm the fault that MGPU_FAULT names in this process. Called by vLLM; raises ValueError for an unknown name."""
    fault = os.environ.get("MGPU_FAULT", "")
    if not fault:
        return
    if fault not in FAULTS:
        raise ValueError(f"cannot break vLLM: MGPU_FAULT is '{fault}', not one of {', '.join(FAULTS)}")
    if fault == "custom-all-reduce-hang":
        _break_custom_all_reduce()
    elif os.environ.get("NCCL_P2P_DISABLE") != "1":
        _break_first_all_reduce(fault)


def _break_first_all_reduce(fault: str) -> None:
    # vllm and torch are imported by name: this file is checked and read where neither is installed.
    communicator = importlib.import_module("vllm.distributed.device_communicators.pynccl").PyNcclCommunicator
    healthy = communicator.all_reduce
    broken = False

    def all_reduce(self: Any, in_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal broken
        if self.rank == VICTIM and not broken:
            broken = True
            if fault == "rank-missing":
                return in_tensor
            _gpu_sleeps()
        return healthy(self, in_tensor, *args, **kwargs)

    communicator.all_reduce = all_reduce


def _break_custom_all_reduce() -> None:
    custom = importlib.import_module("vllm.distributed.device_communicators.custom_all_reduce").CustomAllreduce
    graph = importlib.import_module("torch").cuda.CUDAGraph
    healthy_init, healthy_all_reduce, healthy_replay = custom.__init__, custom.all_reduce, graph.replay
    armed = False

    def go_off() -> None:
        nonlocal armed
        if armed:
            armed = False
            _gpu_sleeps()

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal armed
        healthy_init(self, *args, **kwargs)
        armed = armed or (not self.disabled and self.rank == VICTIM)

    def all_reduce(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("registered"):  # otherwise it is only recorded, for a graph that is being captured
            go_off()
        return healthy_all_reduce(self, *args, **kwargs)

    def replay(self: Any) -> Any:
        go_off()
        return healthy_replay(self)

    custom.__init__, custom.all_reduce, graph.replay = init, all_reduce, replay


def _gpu_sleeps() -> None:
    """Whatever this process asks of its GPU from here on, on the current stream, waits for ever behind a busy kernel."""
    importlib.import_module("torch").cuda._sleep(FOR_EVER)
