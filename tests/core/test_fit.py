"""Whether a model fits, against recorded starts of the real vLLM and as arithmetic must behave."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.core.fit import (
    CONTEXT_BYTES,
    CONTEXT_UNIT,
    CUDA_PART,
    GIB,
    GRAPH_BYTES_PER_LAYER,
    PEER_BYTES,
    Activation,
    Cache,
    Need,
    changes,
    fits,
    least_utilisation,
    tokens_in,
)
from mgpu_llm.core.sharding import Weights

H100 = 85_520_809_984
H200 = 150_754_820_096
#: Qwen2.5-72B in 16 bits, as vLLM 0.26.0 served it on two H200s.
CACHE = Cache(layers=80, heads=8, head_bytes=512)
ACTIVATION = Activation(hidden=8192, intermediate=29568, vocabulary=152064)
BYTES = 145_400_000_000
NEED = Need(weights=Weights(least=BYTES, split=BYTES), cache=CACHE, context=8192, activation=ACTIVATION, heads=8)


def test_the_reckoning_comes_to_what_vllm_said_of_72_billion_parameters_on_two_h200s() -> None:
    fit = fits(NEED, 2, 0.92, H200)
    assert fit.weights / GIB == pytest.approx(67.8, rel=0.01)
    assert fit.left / GIB == pytest.approx(59.41, rel=0.01)
    assert fit.tokens == pytest.approx(389_312, rel=0.01)
    assert not fit.impossible
    assert not fit.tight
    assert tokens_in(NEED, 2, round(59.41 * GIB)) == pytest.approx(389_312, rel=0.001)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "said"), [(3584, 18944, 0.82), (5120, 27648, 0.91), (8192, 29568, 1.34)]
)
def test_the_peak_of_the_trial_run_is_as_in_the_starts_that_it_was_fitted_to(
    hidden: int, intermediate: int, said: float
) -> None:
    found = Activation(hidden=hidden, intermediate=intermediate, vocabulary=152064).peak(2, H200 * CUDA_PART)
    assert found / GIB == pytest.approx(said, rel=0.03)


def test_batches_are_smaller_on_small_gpus_and_larger_on_the_largest_unless_they_are_set() -> None:
    small, usual, large = (ACTIVATION.peak(1, size * GIB) for size in (24, 80, 180))
    assert small < usual < large
    assert replace(ACTIVATION, tokens=8192, sequences=1024).peak(1, 24 * GIB) == usual


def test_one_gpu_cannot_hold_what_two_do() -> None:
    assert fits(NEED, 1, 0.9, H200).impossible
    assert not fits(NEED, 2, 0.9, H200).impossible


def test_weights_that_fit_are_not_enough_where_the_context_needs_more_cache_than_is_left() -> None:
    long = replace(NEED, context=1_000_000)
    assert fits(long, 2, 0.9, H200).impossible
    assert fits(long, 2, 0.9, H200).least_weights < fits(long, 2, 0.9, H200).room
    assert not fits(replace(long, context=None), 2, 0.9, H200).impossible


def test_what_is_only_guessed_of_the_cache_makes_nothing_impossible() -> None:
    guessed = replace(NEED, context=1_000_000, cache=replace(CACHE, certain=False))
    fit = fits(guessed, 2, 0.9, H200)
    assert (fit.least_cache, fit.impossible, fit.tight) == (0, False, True)
    assert least_utilisation(guessed, 2, H200) == 0


def test_without_a_cache_vllm_does_not_hold_the_weights_to_the_budget_but_the_gpu_does() -> None:
    bare = replace(NEED, cache=None)
    fit = fits(bare, 1, 0.5, H200)
    assert (fit.room, fit.tokens, fit.cache, fit.impossible) == (H200, None, 0, False)
    assert fits(bare, 1, 0.99, H100).impossible
    assert least_utilisation(bare, 1, H100) == 0


def test_key_and_value_heads_are_repeated_where_there_are_more_ranks() -> None:
    assert [CACHE.layer_bytes(ranks) for ranks in (1, 2, 8, 16)] == [4096, 2048, 512, 512]
    latent = Cache(layers=61, heads=1, head_bytes=1152)
    assert [latent.layer_bytes(ranks) for ranks in (1, 8)] == [1152, 1152]


def test_windowed_layers_keep_no_more_than_their_window_and_leave_the_tokens_unknown() -> None:
    mixed = Cache(layers=2, heads=1, head_bytes=4, windowed=3, window=100)
    assert mixed.request(50, 1) == 50 * 5 * 4
    assert mixed.request(1000, 1) == (2 * 1000 + 3 * 100) * 4
    assert tokens_in(replace(NEED, cache=mixed), 1, GIB) is None


def test_stages_of_a_pipeline_share_layers_and_the_fullest_of_them_counts_for_the_tokens() -> None:
    staged = replace(NEED, pipeline_parallel=3)
    assert fits(staged, 1, 0.9, H200).least_weights == BYTES // 3
    assert tokens_in(staged, 1, 27 * 4096 * 32) == 32


def test_room_outside_of_the_utilisation_is_for_the_context_the_peers_and_the_graphs() -> None:
    assert fits(replace(NEED, graphs=False), 2, 0.9, H200).beside == CONTEXT_BYTES + PEER_BYTES
    assert fits(NEED, 1, 0.9, H200).beside == CONTEXT_BYTES + 80 * GRAPH_BYTES_PER_LAYER
    high = fits(NEED, 2, 0.99, H200)
    assert (high.impossible, high.tight, high.left > high.cache) == (False, True, True)


def test_the_least_utilisation_is_where_it_stops_to_be_impossible() -> None:
    least = least_utilisation(NEED, 2, H200)
    assert fits(NEED, 2, least - 0.001, H200).impossible
    assert not fits(NEED, 2, least + 0.001, H200).impossible
    assert least_utilisation(NEED, 1, H100) > 1


def advised(need: Need, ranks: int, utilisation: float, gpu: int, sizes: tuple[int, ...] = (2, 4, 8)) -> list[str]:
    return list(changes(need, ranks, utilisation, gpu, ceiling=0.95, sizes=sizes))


def test_a_little_more_utilisation_comes_first_and_no_more_of_it_than_needed() -> None:
    found = advised(NEED, 2, 0.4, H200)
    assert found[0] == "set gpus.memory_utilisation = 0.51"
    assert found[1] == "use 4 GPUs (gpus.use, gpus.tensor_parallel = 4)"


def test_where_no_utilisation_is_enough_a_context_not_much_shorter_comes_before_more_gpus() -> None:
    long = replace(NEED, context=500_000)
    found = advised(long, 2, 0.9, H200)
    assert found[0].startswith('add "--max-model-len", "')
    tokens = int(found[0].split('"')[3])
    assert tokens % CONTEXT_UNIT == 0
    assert not fits(replace(long, context=tokens), 2, 0.9, H200).tight
    assert fits(replace(long, context=tokens + CONTEXT_UNIT), 2, 0.9, H200).tight
    assert found[1:] == [
        "use 4 GPUs (gpus.use, gpus.tensor_parallel = 4)",
        'add "--kv-cache-dtype", "fp8" to engine.args',
    ]


def test_a_much_shorter_context_comes_last() -> None:
    found = advised(replace(NEED, context=4_000_000), 2, 0.9, H200, sizes=())
    assert [word.split('"')[1] for word in found] == ["--max-model-len"]


def test_where_the_weights_alone_are_too_large_only_more_gpus_help() -> None:
    assert advised(NEED, 1, 0.9, H100) == ["use 2 GPUs (gpus.use, gpus.tensor_parallel = 2)"]
    assert advised(replace(NEED, cache=None), 1, 0.9, H100) == ["use 2 GPUs (gpus.use, gpus.tensor_parallel = 2)"]
    assert advised(replace(NEED, context=None), 1, 0.9, H100, sizes=(1,)) == []


def test_a_cache_of_8_bits_is_not_halved_again() -> None:
    small = replace(NEED, context=600_000, cache=replace(CACHE, head_bytes=256, halves=False))
    assert not [word for word in advised(small, 2, 0.4, H200) if "fp8" in word]
    tokens = replace(NEED, context=600_000)
    assert not [word for word in advised(tokens, 1, 0.4, H100) if "fp8" in word]


needs = st.builds(
    lambda least, more, layers, heads, context, windowed, stages: Need(
        weights=Weights(least=least, split=least, whole=more),
        cache=Cache(layers=layers, heads=heads, head_bytes=256, windowed=windowed, window=4096),
        context=context,
        activation=Activation(hidden=1024, intermediate=4096, vocabulary=32000),
        heads=heads,
        pipeline_parallel=stages,
    ),
    st.integers(0, 10**12),
    st.integers(0, 10**9),
    st.integers(1, 128),
    st.integers(1, 64),
    st.none() | st.integers(1, 2_000_000),
    st.integers(0, 64),
    st.integers(1, 4),
)
utilisations = st.floats(0.01, 1.0)
sizes = st.integers(8 * GIB, 300 * GIB)


@given(need=needs, ranks=st.integers(1, 32), utilisation=utilisations, gpu=sizes)
def test_more_gpus_never_need_more_on_each(need: Need, ranks: int, utilisation: float, gpu: int) -> None:
    fewer, more = (fits(need, number, utilisation, gpu) for number in (ranks, ranks * 2))
    assert more.least_weights <= fewer.least_weights
    assert more.least_cache <= fewer.least_cache
    assert more.weights <= fewer.weights
    assert more.left >= fewer.left
    assert fewer.impossible or not more.impossible


@given(need=needs, ranks=st.integers(1, 32), pair=st.tuples(utilisations, utilisations), gpu=sizes)
def test_a_higher_utilisation_never_holds_less(need: Need, ranks: int, pair: tuple[float, float], gpu: int) -> None:
    low, high = (fits(need, ranks, utilisation, gpu) for utilisation in sorted(pair))
    assert high.left >= low.left
    assert low.impossible or not high.impossible


@given(need=needs, ranks=st.integers(1, 32), utilisation=utilisations, gpu=sizes, times=st.floats(1.0, 4.0))
def test_what_is_impossible_is_so_on_every_smaller_gpu_and_never_looks_roomy(
    need: Need, ranks: int, utilisation: float, gpu: int, times: float
) -> None:
    small, large = (fits(need, ranks, utilisation, size) for size in (gpu, round(gpu * times)))
    assert small.impossible or not large.impossible
    assert not small.impossible or small.tight


@given(need=needs, ranks=st.integers(1, 8), utilisation=utilisations, gpu=sizes)
def test_no_change_is_proposed_that_would_not_do(need: Need, ranks: int, utilisation: float, gpu: int) -> None:
    for word in changes(need, ranks, utilisation, gpu, ceiling=0.95, sizes=(16,)):
        if word.startswith("set"):
            fit = fits(need, ranks, float(word.split("= ")[1]), gpu)
            assert not fit.impossible
            assert not fit.tight
