"""What config.json says of a model's shape, and where it does not say enough."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mgpu_llm.config import architecture
from mgpu_llm.core.fit import Activation, Cache
from tests.support.checkpoints import QWEN_7B

CACHE = Cache(layers=28, heads=4, head_bytes=512)
DEEPSEEK: Mapping[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


def cache(*args: str, **more: object) -> Cache | None:
    """Of the 7B shape with these laid over it; "out" takes one out."""
    return architecture.cache({name: value for name, value in {**QWEN_7B, **more}.items() if value != "out"}, args)


def test_keys_and_values_of_every_layer_are_kept_in_the_dtype_of_the_model() -> None:
    assert cache() == CACHE
    assert cache("--dtype", "float32") == Cache(layers=28, heads=4, head_bytes=1024)
    assert cache(head_dim=64) == Cache(layers=28, heads=4, head_bytes=256)


@pytest.mark.parametrize(("asked", "size"), [("auto", 512), ("fp8", 256), ("fp8_e5m2", 256), ("bfloat16", 512)])
def test_the_cache_may_be_kept_in_another_dtype(asked: str, size: int) -> None:
    found = cache("--kv-cache-dtype", asked)
    assert found is not None
    assert (found.head_bytes, found.halves) == (size, size == 512)


def test_a_dtype_of_the_cache_that_is_not_known_leaves_it_unknown() -> None:
    assert cache("--kv-cache-dtype", "nvfp4") is None
    assert cache(quantization_config={"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}) is None
    assert cache(quantization_config={"producer": {}, "quantization": {"kv_cache_quant_algo": "FP8"}}) is None
    assert cache(quantization_config={"quant_method": "fp8", "kv_cache_scheme": None}) == CACHE


@pytest.mark.parametrize("gone", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_without_layers_or_heads_nothing_is_known(gone: str) -> None:
    assert cache(**{gone: "out", "num_key_value_heads": "out"}) is None
    assert cache(num_hidden_layers=10**9) is None
    assert cache(num_key_value_heads=10**9) is None


def test_where_config_json_leaves_something_to_a_default_it_is_only_a_guess() -> None:
    found = cache(num_key_value_heads="out")
    assert found is not None
    assert (found.heads, found.certain) == (28, False)
    mistral = cache(model_type="mistral")
    assert mistral is not None
    assert not mistral.certain
    assert cache(model_type="mistral", sliding_window=None) == CACHE


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "brand_new"},
        {"architectures": ["Qwen2Model"]},
        {"architectures": "Qwen2ForCausalLM"},
        {"is_causal": False},
        {"layer_types": ["linear_attention"] * 28},
    ],
)
def test_kinds_of_model_that_may_keep_less_are_guessed(more: Mapping[str, object]) -> None:
    found = cache(**more)
    assert found is not None
    assert not found.certain


def test_windows_count_only_where_they_are_used_and_for_the_layers_that_have_them() -> None:
    kinds = ["sliding_attention", "full_attention"] * 14
    assert cache(sliding_window=4096, use_sliding_window=False) == CACHE
    assert cache(sliding_window=4096) == CACHE
    assert cache(sliding_window=4096, use_sliding_window=True, layer_types=kinds) == Cache(
        layers=14, heads=4, head_bytes=512, windowed=14, window=4096
    )
    every = Cache(layers=0, heads=4, head_bytes=512, windowed=28, window=4096)
    assert cache(sliding_window=4096, model_type="mistral") == every
    assert cache(sliding_window=4096, model_type="mistral", layer_types=kinds[:3]) == every


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    assert architecture.cache(DEEPSEEK, ()) == Cache(layers=61, heads=1, head_bytes=1152)
    sparse = architecture.cache({**DEEPSEEK, "index_topk": 2048}, ())
    assert sparse is not None
    assert not sparse.certain
    assert architecture.cache({**DEEPSEEK, "kv_lora_rank": None}, ()) is None
    assert architecture.cache({**DEEPSEEK, "qk_rope_head_dim": 0}, ()) is None


def test_of_a_multimodal_model_the_language_model_counts() -> None:
    settings = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": dict(QWEN_7B)}
    assert architecture.cache(settings, ()) == CACHE
    assert architecture.layers(architecture.shape(settings)) == 28
    assert architecture.shape({"a": 1}) == {"a": 1}


def test_whether_the_embedding_is_the_output_too_is_what_any_part_says() -> None:
    assert architecture.is_tied(QWEN_7B) is False
    assert architecture.is_tied({}) is None
    assert architecture.is_tied({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}) is True


def test_the_trial_run_depends_on_sizes_and_on_what_is_set() -> None:
    args = ("--max-num-batched-tokens", "4096", "--max-num-seqs=64")
    assert architecture.activation(QWEN_7B, args) == Activation(
        hidden=3584, intermediate=18944, vocabulary=152064, tokens=4096, sequences=64
    )
    assert architecture.activation({"hidden_size": 10**9}, ()) == Activation()


def test_the_tensors_of_a_plain_dense_model_follow_from_its_shape() -> None:
    found = architecture.tensors(QWEN_7B)
    assert found is not None
    assert sum(tensor.bytes for tensor in found) == 15_231_233_024
    assert len(found) == 339
    llama = architecture.tensors({**QWEN_7B, "model_type": "llama"})
    assert llama is not None
    assert len(found) - len(llama) == 28 * 3


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "mixtral"},
        {"model_type": "qwen3"},
        {"num_hidden_layers": "many"},
        {"hidden_size": None},
        {"num_attention_heads": 10**400, "head_dim": 128},
        {"num_attention_heads": True},
        {"quantization_config": {"quant_method": "awq"}},
    ],
)
def test_of_other_kinds_of_model_they_do_not(more: Mapping[str, object]) -> None:
    assert architecture.tensors({**QWEN_7B, **more}) is None
