"""How vLLM lays a model's tensors over tensor-parallel ranks, by their names and shapes.

Facts are those of vLLM 0.32.0, model_executor/layers: linear.py splits the weights of linear layers evenly and repeats key and
value heads where there are more ranks than of these, vocab_parallel_embedding.py pads the vocabulary to a multiple of 64 and
splits it, ReplicatedLinear and norms are whole on every rank, fused_moe splits every expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod
from typing import Final

#: Bits of one element, by the dtype of a safetensors header (safetensors 0.7, tensor.rs).
BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS: Final = ("F64", "F32", "F16", "BF16")
VOCABULARY_UNIT: Final = 64

#: The layers of a language model as vLLM's loaders know them. Towers, talkers and predictors of later tokens have other
#: prefixes or higher numbers.
_PREFIX: Final = (
    r"(?:model\.|language_model\.|model\.language_model\.|language_model\.model\.|transformer\.)?(?:decoder\.)?"
)
_LAYER: Final = re.compile(_PREFIX + r"(?:layers|h)\.(?P<number>\d{1,6})\.")
_ITS_EMBEDDING: Final = re.compile(_PREFIX + r"(?:embed_tokens|wte)\.weight")
_EMBEDDING: Final = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|tok_embeddings)\.weight")
_HEAD: Final = re.compile(r"(?:.*\.)?lm_head\.[a-z]+")
_KEY_VALUE: Final = re.compile(r".*\.(?:k_proj|v_proj)\.[a-z_]+")
_WHOLE: Final = re.compile(
    r".*\.(?:gate|router|shared_expert_gate|q_a_proj|kv_a_proj_with_mqa|fused_qkv_a_proj)\.[a-z_]+|.*norm\d?\.weight"
)
#: Not on any GPU: tables that vLLM makes itself, and layers that predict several tokens at once, without speculation.
_UNUSED: Final = re.compile(r".*(?:rotary_emb\.inv_freq|masked_bias|attn\.bias)|(?:model\.)?mtp\..*")
#: What some kernels throw away after they have repacked a quantised layer.
_PERHAPS: Final = re.compile(r".*\.(?:qzeros|g_idx|weight_shape)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor of a checkpoint: `dtype` as safetensors writes it ("BF16"), `bytes` as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What is done with them. `layers` is how many of them are loaded, None where nobody knows; `float_bytes` is what a
    parameter of an unquantised layer takes on the GPU; `tied`: the embedding is the output too; `has_head`: the model surely
    computes tokens, and so needs one."""

    layers: int | None
    float_bytes: int = 2
    tied: bool = False
    has_head: bool = True
    quantised: bool = False


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes over all ranks together. `least` is what is loaded for certain, however it is split. The rest is the estimate:
    `split` evenly over the ranks, `key_value` over as many as there are heads, `whole` on every rank."""

    least: int = 0
    split: int = 0
    key_value: int = 0
    whole: int = 0

    def least_on(self, ranks: int) -> int:
        """Bytes that the fullest of so many ranks has at least: no less than the mean."""
        return self.least // ranks

    def on(self, tensor_parallel: int, pipeline_parallel: int, heads: int) -> int:
        """Bytes that a rank will have, as far as can be told; `heads` are those for keys and values."""
        parts = self.split / tensor_parallel + self.key_value / min(tensor_parallel, heads) + self.whole
        return round(parts / pipeline_parallel)


def lay(tensors: Iterable[Tensor], loading: Loading) -> Weights:
    """The weights as they will lie on the GPUs."""
    least = split = key_value = whole = 0
    for tensor in tensors:
        if unused(tensor.name, loading.layers) or (loading.tied and _HEAD.fullmatch(tensor.name)):
            continue
        held = _held(tensor, loading)
        if _certain(tensor, loading):
            least += _least(tensor, loading)
        if _EMBEDDING.fullmatch(tensor.name) or _HEAD.fullmatch(tensor.name):
            split += _padded(tensor, held)
        elif _KEY_VALUE.fullmatch(tensor.name):
            key_value += held
        elif len(tensor.shape) < 2 or _WHOLE.fullmatch(tensor.name):
            whole += held
        else:
            split += held
    return Weights(least=least, split=split, key_value=key_value, whole=whole)


def unused(name: str, layers: int | None) -> bool:
    """Whether a tensor is not loaded at all, of a model of which so many layers are."""
    layer = _LAYER.match(name)
    return _UNUSED.fullmatch(name) is not None or (
        layer is not None and layers is not None and int(layer["number"]) >= layers
    )


def _certain(tensor: Tensor, loading: Loading) -> bool:
    """Whether vLLM loads it whatever the model's kind: of a tensor with another name nobody knows that here."""
    if _PERHAPS.fullmatch(tensor.name):
        return False
    if _HEAD.fullmatch(tensor.name):
        return loading.has_head
    if _ITS_EMBEDDING.fullmatch(tensor.name):
        return True
    return loading.layers is not None and _LAYER.match(tensor.name) is not None


def _held(tensor: Tensor, loading: Loading) -> int:
    """Bytes on the GPU: floats become the dtype of the model, what is quantised stays as it is stored."""
    if loading.quantised or tensor.dtype not in FLOATS:
        return tensor.bytes
    return prod(tensor.shape) * loading.float_bytes


def _least(tensor: Tensor, loading: Loading) -> int:
    """The same where nobody knows which floats of a quantised model are halved."""
    if loading.quantised and tensor.dtype in FLOATS:
        return min(tensor.bytes, prod(tensor.shape) * 2)
    return _held(tensor, loading)


def _padded(tensor: Tensor, held: int) -> int:
    rows = tensor.shape[0] if tensor.shape else 1
    return held * ceil(rows / VOCABULARY_UNIT) * VOCABULARY_UNIT // max(rows, 1)
