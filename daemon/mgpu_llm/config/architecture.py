"""What a model's config.json says of its shape: layers, heads, what its cache keeps, and which tensors it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.model import ATTENTION_HEADS, KEY_VALUE_HEADS, first_integer, language_models
from mgpu_llm.core.fit import Activation, Cache
from mgpu_llm.core.sharding import Tensor

DTYPE: Final[options.Option] = ("--dtype",)
CACHE_DTYPE: Final[options.Option] = ("--kv-cache-dtype",)
BATCHED_TOKENS: Final[options.Option] = ("--max-num-batched-tokens",)
SEQUENCES: Final[options.Option] = ("--max-num-seqs",)
#: Bytes of one number under --dtype (vLLM 0.32.0, config/model.py).
_DTYPES: Final = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
#: And under --kv-cache-dtype. Others keep scales or packed bits beside, and are not known here.
_CACHE_DTYPES: Final = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
#: Kinds of model for which vLLM keeps keys and values of every layer in full, or within the window that config.json names.
_PLAIN: Final = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi", "phi3", "gemma", "gemma2"}
    | {"gemma3_text", "glm", "glm4", "glm4_moe", "granite", "granitemoe", "starcoder2", "olmo", "olmo2", "olmoe"}
    | {"stablelm", "gpt_oss", "internlm3", "ernie4_5", "ernie4_5_moe", "smollm3", "seed_oss"}
)
#: What transformers puts where config.json is silent makes the cache of these smaller than it seems (transformers 4.57, 5.0).
_MUST_SAY: Final[Mapping[str, tuple[str, ...]]] = {
    "mistral": ("sliding_window",),
    "gemma": ("head_dim",),
    "gemma2": ("head_dim", "sliding_window"),
    "gemma3_text": ("head_dim", "sliding_window"),
    "gpt_oss": ("head_dim", "sliding_window"),
    "qwen3": ("head_dim",),
    "qwen3_moe": ("head_dim",),
    "glm": ("head_dim",),
    "glm4": ("head_dim",),
    "glm4_moe": ("head_dim",),
    "seed_oss": ("head_dim",),
}
#: Kinds that keep one latent vector for all heads (multi-head latent attention), the same on every rank.
_LATENT: Final = ("deepseek_v2", "deepseek_v3", "kimi_k2")
#: Kinds whose tensors follow from config.json alone, and those of them with a bias for queries, keys and values.
_DENSE: Final = ("llama", "mistral", "qwen2", "qwen3")
_BIASED: Final = ("qwen2",)
_LAYER_KINDS: Final = frozenset({"full_attention", "sliding_attention"})
#: More is no model that anybody has made; less than this keeps arithmetic with hostile files short.
_MOST: Final = 10_000_000
_MOST_LAYERS: Final = 10_000


def float_bytes(args: Sequence[str]) -> int:
    """Bytes of a parameter that is not quantised. Left to vLLM they are two: it halves those of 32 bits (config/model.py,
    _resolve_auto_dtype, 0.32.0)."""
    return _DTYPES.get(options.value(args, DTYPE) or "", 2)


def shape(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's own settings: the part that names its layers."""
    return next((part for part in language_models(settings) if layers(part) is not None), settings)


def layers(settings: Mapping[str, Any]) -> int | None:
    found = first_integer(settings, ("num_hidden_layers", "n_layers", "n_layer", "num_layers"))
    return found if found is not None and found <= _MOST_LAYERS else None


def quantisation(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the stored weights are quantised, {} where they are not."""
    parts = (part.get("quantization_config") or part.get("compression_config") for part in language_models(settings))
    return next((part for part in parts if isinstance(part, Mapping)), {})


def is_tied(settings: Mapping[str, Any]) -> bool | None:
    """Whether the embedding is the output too, None where config.json leaves that to the kind of model."""
    said = [part["tie_word_embeddings"] for part in language_models(settings) if "tie_word_embeddings" in part]
    return any(said) if said else None


def cache(settings: Mapping[str, Any], args: Sequence[str]) -> Cache | None:
    """What the KV cache keeps, None where it cannot be told."""
    model, number = shape(settings), _cache_bytes(settings, args)
    count, width = layers(model), _head_size(model)
    if count is None or number is None:
        return None
    if "kv_lora_rank" in model:
        return _latent(model, count, number)
    heads = key_value_heads(settings)
    if not heads or not width:
        return None
    windowed, window = _windowed(model, count)
    return Cache(
        layers=count - windowed,
        heads=heads,
        head_bytes=2 * width * number,
        windowed=windowed,
        window=window,
        certain=_is_certain(settings, model),
        halves=number > 1,
    )


def key_value_heads(settings: Mapping[str, Any]) -> int:
    """0 where nobody says how many there are."""
    model = shape(settings)
    return _bounded(first_integer(model, KEY_VALUE_HEADS) or first_integer(model, ATTENTION_HEADS))


def generates(settings: Mapping[str, Any]) -> bool:
    """Whether it computes token after token for certain, and so has an output layer and a cache."""
    named = settings.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    causal = all(part.get("is_causal", True) is True for part in language_models(settings))
    return causal and any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)


def activation(settings: Mapping[str, Any], args: Sequence[str]) -> Activation:
    """What the trial run depends on, 0 for what config.json does not say."""
    model = shape(settings)
    sizes = (_size(model, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    hidden, intermediate, vocabulary = sizes
    return Activation(
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tokens=options.number(args, BATCHED_TOKENS),
        sequences=options.number(args, SEQUENCES),
    )


def tensors(settings: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """Those that a checkpoint of such a model has, for plain dense ones that are not quantised; else None."""
    model, count = shape(settings), layers(shape(settings))
    kind = str(model.get("model_type", ""))
    if kind not in _DENSE or count is None or quantisation(settings):
        return None
    hidden, wide, vocabulary = (_size(model, name) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, width = _bounded(first_integer(model, ATTENTION_HEADS)), _head_size(model)
    if any(name not in model for name in _MUST_SAY.get(kind, ())):
        return None
    if not (hidden and wide and vocabulary and heads and width):
        return None
    queries, keys = heads * width, (_bounded(first_integer(model, KEY_VALUE_HEADS)) or heads) * width
    parts = {
        **{f"self_attn.{name}_proj.weight": (rows, hidden) for name, rows in zip("qkv", (queries, keys, keys), strict=True)},
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip
    if kind in _BIASED:
        parts |= {
            f"self_attn.{name}_proj.bias": (rows,) for name, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
    return tuple(_made(parts, count, (vocabulary, hidden)))


def _made(parts: Mapping[str, tuple[int, ...]], count: int, embedding: tuple[int, int]) -> Iterator[Tensor]:
    outer = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, "model.norm.weight": embedding[1:]}
    inner = {f"model.layers.{index}.{name}": size for index in range(count) for name, size in parts.items()}
    for name, size in {**outer, **inner}.items():
        yield Tensor(name=name, dtype="BF16", shape=size, bytes=2 * prod(size))


def _cache_bytes(settings: Mapping[str, Any], args: Sequence[str]) -> int | None:
    """Bytes of one number in the cache. Left to vLLM they are the model's, or as a quantised checkpoint asks."""
    asked = options.value(args, CACHE_DTYPE) or "auto"
    if asked != "auto":
        return _CACHE_DTYPES.get(asked)
    told = quantisation(settings)
    parts = [told, *(part for part in told.values() if isinstance(part, Mapping))]
    named = [value for part in parts for key, value in part.items() if str(key).startswith("kv_cache")]
    return float_bytes(args) if all(value is None for value in named) else None


def _head_size(model: Mapping[str, Any]) -> int:
    heads = first_integer(model, ATTENTION_HEADS)
    return _size(model, "head_dim") or (_size(model, "hidden_size") // heads if heads else 0)


def _latent(model: Mapping[str, Any], count: int, number: int) -> Cache | None:
    """One vector for all heads, with the part that tells positions apart."""
    latent, rope = _size(model, "kv_lora_rank"), _size(model, "qk_rope_head_dim")
    if not latent or not rope:
        return None
    certain = model.get("model_type") in _LATENT and "index_topk" not in model
    return Cache(layers=count, heads=1, head_bytes=(latent + rope) * number, certain=certain, halves=number > 1)


def _is_certain(settings: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether vLLM keeps what config.json says and no less."""
    kind = str(model.get("model_type", ""))
    told = all(name in model for name in ("num_key_value_heads", *_MUST_SAY.get(kind, ())))
    return kind in _PLAIN and told and generates(settings) and _layer_kinds(model) <= _LAYER_KINDS


def _windowed(model: Mapping[str, Any], count: int) -> tuple[int, int]:
    """How many layers keep a window, and its tokens: all of them where nobody says which."""
    window = _size(model, "sliding_window")
    if not window or model.get("use_sliding_window", not str(model.get("model_type")).startswith("qwen")) is not True:
        return 0, 0
    kinds = model.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == count:
        return kinds.count("sliding_attention"), window
    return count, window


def _layer_kinds(model: Mapping[str, Any]) -> set[str]:
    kinds = model.get("layer_types")
    return {str(kind) for kind in kinds} if isinstance(kinds, list) else set()


def _size(model: Mapping[str, Any], name: str) -> int:
    return _bounded(first_integer(model, (name,)))


def _bounded(found: int | None) -> int:
    return found if found is not None and found <= _MOST else 0
