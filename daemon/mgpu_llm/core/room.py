"""What an engine must find free on its GPUs: vLLM ends at once where others hold more, after it has imported for a minute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mgpu_llm.core import transports, versions
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.states import Policy

#: The first vLLM that compares what is free with --gpu-memory-utilization before it loads (v1/worker/gpu_worker.py of 0.11.0,
#: request_memory in v1/worker/utils.py of 0.32.0; not so 0.8.4).
LEAST_VLLM: Final = (0, 11)
#: Builds for GPUs that share the host's memory are patched to leave it out.
LEFT_OUT: Final = "VLLM_SKIP_INIT_MEMORY_CHECK"
#: Of weights that another process holds for it, vLLM asks for no room of its own (ipc_loader.py of 0.32.0).
HELD_BY_ANOTHER: Final = "ipc_cache"


def is_compared(vllm: str, load_format: str | None, environment: Mapping[str, str]) -> bool:
    """Whether that version compares for certain, in the engine's `environment`; not where nobody tells it."""
    told = versions.release(vllm)
    other = load_format == HELD_BY_ANOTHER or bool(environment.get(LEFT_OUT))
    return told is not None and told >= LEAST_VLLM and not other


def needed(policy: Policy, rung: Rung) -> Mapping[str, float]:
    """The fraction of its memory that each GPU must have free, by entry of CUDA_VISIBLE_DEVICES; none where that is not known."""
    utilisation = policy.launch(rung).utilisation
    if utilisation is None or not policy.free_is_compared:
        return {}
    return dict.fromkeys(transports.ranks(policy.ladder, rung), utilisation)
