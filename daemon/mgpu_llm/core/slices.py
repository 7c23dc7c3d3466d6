"""What can run on a MIG slice, which is named by its UUID: a part of a GPU that CUDA takes for a GPU."""

from __future__ import annotations

from typing import Final

from mgpu_llm.core import versions

#: CUDA shows a process one MIG slice and nothing beside it (NVIDIA's MIG user guide, "CUDA_VISIBLE_DEVICES"), and NCCL has one
#: rank on a GPU, whatever the slices (NVIDIA/nccl, issue 1716).
ONE_SLICE: Final = "CUDA shows an engine one MIG slice and nothing beside it"
#: The first vLLM that takes UUIDs in CUDA_VISIBLE_DEVICES; those before make a number of each entry, and end with "invalid
#: literal for int()" (platforms/interface.py, device_id_to_physical_device_id: so 0.22.1 and 0.23.0, not so 0.24.0, 0.25.0 and
#: 0.32.0).
LEAST_VLLM: Final = (0, 24)


def is_slice(gpu: int | str) -> bool:
    """Whether that names a MIG slice, and no whole GPU."""
    return str(gpu).startswith("MIG-")


def too_old(vllm: str) -> bool:
    """Whether that version of vLLM cannot be given a slice; not where nobody tells the version."""
    told = versions.release(vllm)
    return told is not None and told < LEAST_VLLM


def least_vllm() -> str:
    """In words, what else it takes."""
    return f"vLLM {'.'.join(map(str, LEAST_VLLM))} or later, which understands UUIDs in CUDA_VISIBLE_DEVICES"
