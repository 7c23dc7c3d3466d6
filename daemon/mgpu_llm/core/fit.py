"""Whether a model fits: what weights and cache need on each GPU, against what vLLM may take of it.

Two answers to every question. The least that is needed leaves out all that is not certain, and only from it follows "does
not fit"; the estimate has everything in it, and says how many tokens there will be room for, and where it may be tight.

How vLLM reckons (v1/worker/gpu_worker.py, determine_available_memory; utils/mem_utils.py, 0.26.0 and 0.32.0): the budget is
utilisation x total; from it go the weights, the peak of a trial run and what else it has taken since it began. The CUDA
context and NCCL's buffers are taken before it begins to count: they are beside the budget, and so are, in 0.26.0, graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Final

from mgpu_llm.core.sharding import Weights

GIB: Final = 1 << 30
#: What CUDA calls the total against what NVML does, which counts the driver's reserve: 79.18 of 79.65 GiB on an H100, 139.8 of
#: 140.4 GiB on an H200 (recorded starts of vLLM 0.26.0, drivers of 2025).
CUDA_PART: Final = 0.994
#: Not torch's and inside the budget: 0.06 to 0.07 GiB in every recorded start over two GPUs (vLLM 0.26.0).
OTHER_BYTES: Final = round(0.07 * GIB)
#: Beside the budget before vLLM counts: CUDA context and NCCL over two ranks without peer-to-peer, and how much more it is with
#: (1.46 GiB together on H200s, 1.47 on H100s; total less "free on startup", vLLM 0.26.0). One rank alone was not measured.
CONTEXT_BYTES: Final = round(0.99 * GIB)
PEER_BYTES: Final = round(0.48 * GIB)
#: Graphs of 51 batch sizes: 0.55 GiB for 28 layers, 1.09 for 64, 1.51 for 80 (vLLM 0.26.0, peer-to-peer on).
GRAPH_BYTES_PER_LAYER: Final = round(0.019 * GIB)
#: vLLM hands out its cache in blocks of so many tokens, unless told otherwise.
BLOCK_TOKENS: Final = 16
#: Shorter contexts than this part of what was asked for are no small change.
SMALL_CHANGE: Final = 0.5
#: Context lengths that are proposed are whole multiples of this.
CONTEXT_UNIT: Final = 256


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What the KV cache takes. `head_bytes` is for one token in one layer and one of `heads`; `windowed` layers keep no more
    than `window` tokens. `certain`: vLLM keeps just that for this kind of model; otherwise it is a guess. `halves`: it is
    kept in 16 bits, and could be in 8."""

    layers: int
    heads: int
    head_bytes: int
    windowed: int = 0
    window: int = 0
    certain: bool = True
    halves: bool = True

    def layer_bytes(self, tensor_parallel: int) -> int:
        """Of one token in one layer on each rank: heads are repeated where there are more ranks."""
        return ceil(self.heads / min(tensor_parallel, self.heads)) * self.head_bytes

    def request(self, tokens: int, tensor_parallel: int) -> int:
        """Bytes of one request of so many tokens, over all stages of a pipeline."""
        kept = self.layers * tokens + self.windowed * min(tokens, self.window)
        return kept * self.layer_bytes(tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What the trial run is about: batches of `tokens`, and tokens drawn for `sequences` at a time. None: as vLLM has it for
    a GPU of that size."""

    hidden: int = 0
    intermediate: int = 0
    vocabulary: int = 0
    tokens: int | None = None
    sequences: int | None = None

    def peak(self, tensor_parallel: int, gpu_bytes: float) -> int:
        """Bytes at its highest, in a form that was fitted to three recorded shapes (7B, 32B and 72B over two ranks, vLLM
        0.26.0: 0.82, 0.91 and 1.34 GiB): logits in 32 bits and their gathered parts, or nine hidden states and one MLP."""
        tokens, sequences = self.tokens or _batch(gpu_bytes), self.sequences or _sequences(gpu_bytes)
        state = tokens * self.hidden * 2
        sampler = sequences * self.vocabulary * 5 + 2 * state
        return max(sampler, 9 * state + tokens * self.intermediate // tensor_parallel * 2)


def _batch(gpu_bytes: float) -> int:
    """--max-num-batched-tokens where nobody sets it (engine/arg_utils.py, get_batch_defaults, 0.32.0; A100s have the least)."""
    if gpu_bytes >= 160 * GIB:
        return 16384
    return 8192 if gpu_bytes >= 70 * GIB else 2048


def _sequences(gpu_bytes: float) -> int:
    return 1024 if gpu_bytes >= 70 * GIB else 256


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a model needs wherever it runs. `cache` is None where nobody knows whether and how it keeps one, `context` the
    tokens of the longest request, None where vLLM chooses it by what is left or nobody knows it, `heads` those for keys and
    values."""

    weights: Weights
    cache: Cache | None = None
    context: int | None = None
    activation: Activation = Activation()
    heads: int = 1
    pipeline_parallel: int = 1
    graphs: bool = True


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The reckoning for one GPU, in bytes. `room` is the most that vLLM may take for weights and cache; `least_weights` and
    `least_cache` are needed for certain. The rest are estimates: `weights`, `cache` for one request of the whole context,
    `overhead` inside the budget, `left` for the cache, and `beside` for what is needed outside the budget, where `outside`
    is. `tokens` is what `left` holds, None where unknown."""

    room: int
    least_weights: int
    least_cache: int
    weights: int
    cache: int
    overhead: int
    left: int
    beside: int
    outside: int
    tokens: int | None

    @property
    def impossible(self) -> bool:
        """Whether it cannot fit, for certain."""
        return self.least_weights + self.least_cache > self.room

    @property
    def tight(self) -> bool:
        """Whether the estimate says that it does not fit."""
        return self.left <= 0 or self.cache > self.left or self.beside > self.outside


def fits(need: Need, tensor_parallel: int, utilisation: float, gpu_bytes: int) -> Fit:
    """The reckoning for a number of ranks and a part of GPUs that have `gpu_bytes` each as NVML tells them."""
    total, stages, cache = gpu_bytes * CUDA_PART, need.pipeline_parallel, need.cache
    # A model without a cache is not held to the budget; and CUDA's total is a little below NVML's.
    room = ceil(gpu_bytes * (utilisation if cache is not None and cache.certain else 1.0))
    one = cache.request(need.context or BLOCK_TOKENS, tensor_parallel) if cache is not None else 0
    weights = need.weights.on(tensor_parallel, stages, need.heads)
    overhead = need.activation.peak(tensor_parallel, total) + OTHER_BYTES
    left = floor(total * utilisation) - weights - overhead
    return Fit(
        room=room,
        least_weights=need.weights.least_on(tensor_parallel * stages),
        least_cache=one // stages if cache is not None and cache.certain else 0,
        weights=weights,
        cache=ceil(one / stages),
        overhead=overhead,
        left=left,
        beside=_beside(need, tensor_parallel),
        outside=floor(total * (1 - utilisation)),
        tokens=tokens_in(need, tensor_parallel, left),
    )


def _beside(need: Need, tensor_parallel: int) -> int:
    layers = need.cache.layers + need.cache.windowed if need.cache is not None and need.graphs else 0
    peers = PEER_BYTES if tensor_parallel * need.pipeline_parallel > 1 else 0
    return CONTEXT_BYTES + peers + layers * GRAPH_BYTES_PER_LAYER // need.pipeline_parallel


def tokens_in(need: Need, tensor_parallel: int, cache_bytes: int) -> int | None:
    """How many tokens a cache of so many bytes holds on each rank; None where layers differ or nobody knows them."""
    if need.cache is None or need.cache.windowed:
        return None
    one = need.cache.layer_bytes(tensor_parallel) * ceil(need.cache.layers / need.pipeline_parallel)
    return max(cache_bytes, 0) // (one * BLOCK_TOKENS) * BLOCK_TOKENS


def least_utilisation(need: Need, tensor_parallel: int, gpu_bytes: int) -> float:
    """The part of each GPU below which it cannot fit, for certain; more than 1 where no part is enough, 0 where any may be."""
    if need.cache is None or not need.cache.certain:
        return 0.0
    fit = fits(need, tensor_parallel, 1.0, gpu_bytes)
    return (fit.least_weights + fit.least_cache) / gpu_bytes


def changes(
    need: Need, tensor_parallel: int, utilisation: float, gpu_bytes: int, *, ceiling: float, sizes: Iterable[int]
) -> tuple[str, ...]:
    """Single changes with which it would fit by the estimate, each as a demand, least intrusive first: utilisation up to
    `ceiling`, a context not much shorter, more ranks (`sizes` are those that split the heads, smallest first), a cache of 8
    bits, a much shorter context."""
    now = _Now(need=need, tensor_parallel=tensor_parallel, utilisation=utilisation, gpu_bytes=gpu_bytes)
    found = (
        *_higher(now, ceiling),
        *_shorter(now, SMALL_CHANGE),
        *_more_gpus(now, sizes),
        *_fp8(now),
        *_shorter(now, 0.0),
    )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class _Now:
    need: Need
    tensor_parallel: int
    utilisation: float
    gpu_bytes: int

    def would(self) -> bool:
        fit = fits(self.need, self.tensor_parallel, self.utilisation, self.gpu_bytes)
        return not fit.impossible and not fit.tight


def _higher(now: _Now, ceiling: float) -> Iterator[str]:
    first, last = floor(now.utilisation * 100) + 1, floor(ceiling * 100 + 1e-9)
    for percent in range(first, last + 1):
        if replace(now, utilisation=percent / 100).would():
            yield f"set gpus.memory_utilisation = {percent / 100:.2f}"
            return


def _shorter(now: _Now, least_part: float) -> Iterator[str]:
    """The longest context for which the cache that is left is enough."""
    cache, asked = now.need.cache, now.need.context
    if cache is None or asked is None:
        return
    low, high = 0, (asked - 1) // CONTEXT_UNIT
    while low < high:
        middle = (low + high + 1) // 2
        enough = replace(now, need=replace(now.need, context=middle * CONTEXT_UNIT)).would()
        low, high = (middle, high) if enough else (low, middle - 1)
    if low > 0 and low * CONTEXT_UNIT >= least_part * asked:
        yield f'add "--max-model-len", "{low * CONTEXT_UNIT}" to engine.args'


def _more_gpus(now: _Now, sizes: Iterable[int]) -> Iterator[str]:
    for size in sizes:
        if size > now.tensor_parallel and replace(now, tensor_parallel=size).would():
            yield f"use {size * now.need.pipeline_parallel} GPUs (gpus.use, gpus.tensor_parallel = {size})"
            return


def _fp8(now: _Now) -> Iterator[str]:
    cache = now.need.cache
    if cache is not None and cache.halves:
        half = replace(cache, head_bytes=cache.head_bytes // 2, halves=False)
        if replace(now, need=replace(now.need, cache=half)).would():
            yield 'add "--kv-cache-dtype", "fp8" to engine.args'
