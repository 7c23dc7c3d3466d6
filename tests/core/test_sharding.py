"""How tensors lie on the ranks, by name and shape, and what is loaded for certain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.core.sharding import Loading, Tensor, Weights, lay, unused

TWO_LAYERS = Loading(layers=2)
LAYER = "model.layers.1."


def tensor(name: str, *shape: int, dtype: str = "BF16", bytes_: int | None = None) -> Tensor:
    size = 4 if dtype == "F32" else 2
    for length in shape:
        size *= length
    return Tensor(name=name, dtype=dtype, shape=shape, bytes=size if bytes_ is None else bytes_)


def of(name: str, *shape: int, loading: Loading = TWO_LAYERS, dtype: str = "BF16") -> Weights:
    return lay([tensor(name, *shape, dtype=dtype)], loading)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.experts.3.up_proj"])
def test_linear_layers_and_experts_are_split_over_all_ranks(name: str) -> None:
    assert of(f"{LAYER}{name}.weight", 8, 8) == Weights(least=128, split=128)


def test_keys_and_values_are_split_by_heads_and_repeated_beyond_them() -> None:
    found = of(f"{LAYER}self_attn.k_proj.weight", 8, 8)
    assert found == Weights(least=128, key_value=128)
    assert [found.on(ranks, 1, 4) for ranks in (1, 2, 4, 8, 16)] == [128, 64, 32, 32, 32]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_layernorm.weight", (8,)),
        ("self_attn.q_proj.bias", (8,)),
        ("mlp.gate.weight", (4, 8)),
        ("self_attn.kv_a_proj_with_mqa.weight", (8, 8)),
    ],
)
def test_norms_biases_routers_and_latents_are_whole_on_every_rank(name: str, shape: tuple[int, ...]) -> None:
    found = of(LAYER + name, *shape)
    assert (found.split, found.key_value) == (0, 0)
    assert found.on(8, 1, 4) == found.whole == found.least


def test_the_vocabulary_is_padded_to_a_multiple_of_64_and_split() -> None:
    assert of("model.embed_tokens.weight", 65, 4) == Weights(least=520, split=1024)
    assert of("lm_head.weight", 64, 4) == Weights(least=512, split=512)
    assert of("lm_head.weight") == Weights(least=2, split=128)
    assert of("lm_head.weight", 0, 4) == Weights()


def test_a_tied_output_is_counted_once_and_one_that_may_be_left_out_is_not_certain() -> None:
    assert of("lm_head.weight", 64, 4, loading=Loading(layers=2, tied=True)) == Weights()
    assert of("lm_head.weight", 64, 4, loading=Loading(layers=2, has_head=False)) == Weights(split=512)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "mtp.layers.0.weight", f"{LAYER}self_attn.rotary_emb.inv_freq"]
)
def test_what_is_never_loaded_counts_for_nothing(name: str) -> None:
    assert of(name, 8, 8) == Weights()
    assert unused(name, 2)


def test_where_nobody_knows_how_many_layers_there_are_none_is_certain() -> None:
    assert of("model.layers.61.mlp.up_proj.weight", 8, 8, loading=Loading(layers=None)) == Weights(split=128)
    assert not unused("model.layers.61.mlp.up_proj.weight", None)


@pytest.mark.parametrize("name", ["visual.blocks.0.attn.qkv.weight", "talker.model.layers.0.mlp.up_proj.weight"])
def test_towers_that_vllm_may_leave_out_are_in_the_estimate_only(name: str) -> None:
    assert of(name, 8, 8) == Weights(split=128)


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model.", "transformer."])
def test_the_layers_of_a_language_model_are_certain_under_any_of_its_prefixes(prefix: str) -> None:
    assert of(f"{prefix}layers.0.mlp.up_proj.weight", 8, 8).least == 128


def test_floats_become_the_dtype_of_the_model() -> None:
    name = f"{LAYER}mlp.up_proj.weight"
    assert of(name, 8, 8, dtype="F32") == Weights(least=128, split=128)
    assert of(name, 8, 8, loading=Loading(layers=2, float_bytes=4)) == Weights(least=256, split=256)


def test_what_is_quantised_stays_as_it_is_stored_and_its_scales_may_be_halved() -> None:
    packed = tensor(f"{LAYER}mlp.up_proj.qweight", 8, 8, dtype="I32", bytes_=256)
    quantised = Loading(layers=2, quantised=True, float_bytes=4)
    assert lay([packed], quantised) == Weights(least=256, split=256)
    assert of(f"{LAYER}mlp.up_proj.scales", 8, 8, dtype="F32", loading=quantised) == Weights(least=128, split=256)
    assert of(f"{LAYER}mlp.up_proj.qzeros", 8, 8, dtype="I32", loading=quantised).least == 0


@given(
    parts=st.lists(st.integers(0, 10**12), min_size=3, max_size=3),
    heads=st.integers(1, 64),
    ranks=st.integers(1, 64),
    stages=st.integers(1, 8),
)
def test_more_ranks_never_have_more_on_each(parts: list[int], heads: int, ranks: int, stages: int) -> None:
    split, key_value, whole = parts
    found = Weights(least=sum(parts), split=split, key_value=key_value, whole=whole)
    assert found.on(ranks + 1, stages, heads) <= found.on(ranks, stages, heads)
    assert found.least_on(ranks + 1) <= found.least_on(ranks)
    assert found.least_on(ranks * stages) <= found.on(ranks, stages, heads) + 1


def experts_model(
    layers: int, hidden: int, experts: int, wide: int, queries: int, keys: int, vocabulary: int
) -> list[Tensor]:
    """A mixture of experts as Qwen3's checkpoints name it."""
    parts = {"self_attn.q_proj.weight": (queries, hidden), "self_attn.o_proj.weight": (hidden, queries)}
    parts |= {f"self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"} | {"mlp.gate.weight": (experts, hidden)}
    for expert in range(experts):
        parts |= {f"mlp.experts.{expert}.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        parts[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, wide)
    outer = [tensor(name, vocabulary, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    return outer + [
        tensor(f"model.layers.{layer}.{name}", *shape) for layer in range(layers) for name, shape in parts.items()
    ]


@pytest.mark.parametrize(("ranks", "said_gib"), [(2, 28.4767), (4, 14.2474)])
def test_a_mixture_of_experts_takes_what_operators_report_of_it(ranks: int, said_gib: float) -> None:
    """Qwen3-30B-A3B: "Model loading took ... GiB" of starts that were not ours (vLLM issue 17327 for four ranks)."""
    found = lay(experts_model(48, 2048, 128, 768, 4096, 512, 151936), Loading(layers=48))
    assert found.on(ranks, 1, 4) / 2**30 == pytest.approx(said_gib, rel=0.03)
    assert found.least_on(ranks) <= said_gib * 2**30
