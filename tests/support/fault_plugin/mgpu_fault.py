"""A vLLM plugin that breaks a healthy engine on purpose, so that a supervisor can be tried on a real one.

vLLM loads it in every engine process (entry point group "vllm.general_plugins"); it does nothing unless MGPU_FAULT is set, to
one of these or to several with commas between them:

p2p-hang         The fabric drops what one rank writes into another's memory: in the first collective of the tensor parallel
                 group every rank spins on a flag in its own memory that only the peer's write would raise. NCCL_P2P_DISABLE=1
                 cures it.
rank-missing     The last rank sleeps before that collective, so the others wait in it, idle. NCCL_P2P_DISABLE=1 cures it.
exit-in-weights  Loading the weights runs out of CUDA memory unless --gpu-memory-utilization is 0.8 or less.
exit-in-capture  Warm-up runs out of CUDA memory where graphs would be captured; --enforce-eager cures it.
broken-gpu       Once the model has been warmed up, rank 1's GPU reports a memory error that it cannot correct.
                 --tensor-parallel-size 1 does without it.
hang-warm-up     The last rank sleeps when the model is to be warmed up, so EngineCore waits for its answer and complains of it
                 every VLLM_RINGBUFFER_WARNING_INTERVAL seconds.
spin-in-warm-up  The same, and whoever waits spins in Python instead of sleeping, as vLLM did before it had SpinCondition (0.8.4):
                 its stack is another one at every look, though nothing gets anywhere.
jit-lock         After the weights every rank builds a C++ extension in MGPU_FAULT_BUILD_DIR, as torch's cpp_extension does for
                 kernels that are compiled when needed. A file "lock" there, left by a builder that died, is waited for.

Made for vLLM 0.32.0 on CPU, where the first collective of the tensor parallel group is made by
CpuCommunicator._all_group_ranks_share_shm_group_name, as PyNcclCommunicator.__init__ makes it on GPUs: inside
ensure_model_parallel_initialized, before the line "rank 0 in world size 2 is assigned as".
"""

import ctypes
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

MEMORY_CURED_AT = 0.8
BROKEN_RANK = 1
#: What torch 2.13 says, on an 80 GB card.
CAPTURE_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU {gpu} has a total capacity of 79.15 GiB of which 310.00 MiB is free."
    " Including non-PyTorch memory, this process has 78.84 GiB memory in use. Of the allocated memory 76.52 GiB is allocated"
    " by PyTorch, with 1.15 GiB allocated in private pools (e.g., CUDA Graphs), and 58.21 MiB is reserved by PyTorch but"
    " unallocated."
)
ECC_ERROR = """\
CUDA error: uncorrectable ECC error encountered
Search for `cudaErrorECCUncorrectable' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more \
information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


def register() -> None:
    """Arm the faults that MGPU_FAULT names in this process. Called by vLLM; raises ValueError for an unknown name."""
    named = [name for name in os.environ.get("MGPU_FAULT", "").split(",") if name]
    if unknown := [name for name in named if name not in FAULTS]:
        raise ValueError(f"cannot break vLLM: MGPU_FAULT names '{unknown[0]}', which is not one of {', '.join(FAULTS)}")
    for name in named:
        FAULTS[name]()


def _break_first_collective(fault: Callable[[Any], None]) -> None:
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return
    # vllm and torch are imported by name: this file is checked and read where neither is installed.
    module = importlib.import_module("vllm.distributed.device_communicators.cpu_communicator")
    healthy = module.CpuCommunicator._all_group_ranks_share_shm_group_name

    def first_collective(communicator: Any) -> bool:
        fault(communicator)
        return bool(healthy(communicator))

    module.CpuCommunicator._all_group_ranks_share_shm_group_name = first_collective


def _spin_for_ever(_: Any) -> None:
    """Spin in C without the interpreter's lock: the stack stands still, a core is busy, and Python never sees a signal."""
    os.nice(19)  # a real spin takes a core of its own; on a small machine this one leaves it to whoever needs it
    libc = ctypes.CDLL(None)
    flag = ctypes.c_int()
    libc.pthread_spin_init(ctypes.byref(flag), 0)
    libc.pthread_spin_lock(ctypes.byref(flag))
    libc.pthread_spin_lock(ctypes.byref(flag))


def _last_rank_sleeps_in_collective(communicator: Any) -> None:
    if communicator.rank_in_group == communicator.world_size - 1:
        _sleep_for_ever()


def _sleep_for_ever() -> None:
    """Sleep in C with every signal held back, so that only SIGKILL ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        ctypes.CDLL(None).pause()


def _run_out_of_memory_in_weights() -> None:
    loader = importlib.import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader
    config = importlib.import_module("vllm.config")
    torch = importlib.import_module("torch")
    healthy = loader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        healthy(self, model, model_config)
        utilization = config.get_current_vllm_config().cache_config.gpu_memory_utilization
        if utilization > MEMORY_CURED_AT:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
                " of which 3.31 GiB is free."
            )

    loader.load_weights = load_weights


def _break_warm_up(*, before: Callable[[Any], None] | None = None, after: Callable[[Any], None] | None = None) -> None:
    # The others never have it, and would import for half a second longer than without the fault.
    if not multiprocessing.current_process().name.startswith("VllmWorker"):
        return
    worker = importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
    healthy = worker.compile_or_warm_up_model

    def compile_or_warm_up_model(self: Any) -> Any:
        if before is not None:
            before(self)
        took = healthy(self)
        if after is not None:
            after(self)
        return took

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def _last_rank_sleeps(worker: Any) -> None:
    if worker.rank == worker.parallel_config.world_size - 1:
        _sleep_for_ever()


def _graphs_do_not_fit(worker: Any) -> None:
    # By another name: on a GPU the error comes out of C++, and no line of Python in its traceback names it.
    error = importlib.import_module("torch").OutOfMemoryError
    if not worker.model_config.enforce_eager:
        raise error(CAPTURE_OUT_OF_MEMORY.format(gpu=worker.rank))


def _memory_is_broken(worker: Any) -> None:
    error = importlib.import_module("torch").AcceleratorError
    if worker.rank == BROKEN_RANK:
        raise error(ECC_ERROR)


def _spin_in_warm_up() -> None:
    _spin_while_waiting()
    _break_warm_up(before=_last_rank_sleeps)


def _spin_while_waiting() -> None:
    queues = importlib.import_module("vllm.distributed.device_communicators.shm_broadcast")

    def wait(condition: Any, timeout_ms: int | None = None) -> None:
        queues.sched_yield()

    queues.SpinCondition.wait = wait


def _build_after_weights() -> None:
    folder = Path(os.environ["MGPU_FAULT_BUILD_DIR"])
    loader = importlib.import_module("vllm.model_executor.model_loader.default_loader").DefaultModelLoader
    healthy = loader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        healthy(self, model, model_config)
        source = folder / "kernel.cpp"
        source.write_text("#include <torch/extension.h>\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {}\n")
        importlib.import_module("torch.utils.cpp_extension").load(
            "mgpu_kernel", [str(source)], build_directory=str(folder)
        )

    loader.load_weights = load_weights


FAULTS: Mapping[str, Callable[[], None]] = {
    "p2p-hang": partial(_break_first_collective, _spin_for_ever),
    "rank-missing": partial(_break_first_collective, _last_rank_sleeps_in_collective),
    "exit-in-weights": _run_out_of_memory_in_weights,
    "exit-in-capture": partial(_break_warm_up, before=_graphs_do_not_fit),
    "broken-gpu": partial(_break_warm_up, after=_memory_is_broken),
    "hang-warm-up": partial(_break_warm_up, before=_last_rank_sleeps),
    "spin-in-warm-up": _spin_in_warm_up,
    "jit-lock": _build_after_weights,
}
