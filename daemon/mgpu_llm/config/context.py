"""How long the context is that vLLM will serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.model import language_models, model_settings
from mgpu_llm.config.schema import Config

#: vLLM takes the smallest of these, and model_max_length before any (transformers_utils/model_arch_config_convertor.py, 0.32.0).
_LENGTHS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
#: More is no length that anybody has made a model for.
MOST_TOKENS: Final = 1_000_000_000
_OVERRIDING: Final = "model_max_length"
#: Position embeddings that leave the length as it is written. What becomes of it under the others differs between versions of
#: vLLM (yarn) or is not the model's longest (longrope).
_PLAIN: Final = frozenset({"default", "llama3", "mrope"})


def context_length(config: Config, environ: Mapping[str, str]) -> int | None:
    """In tokens, prompt and answer together: --max-model-len, or else what the model was made for. None where neither tells
    for certain. `environ` is what the engine inherits."""
    args = config.engine.args
    if options.has(args, options.CONTEXT):
        return options.tokens(args)
    if options.has_any(args, options.OTHER_CONTEXT):
        return None
    for settings in language_models(model_settings(config, environ)):
        lengths = (_tokens(settings, name) for name in _LENGTHS)
        length = _tokens(settings, _OVERRIDING) or min(filter(None, lengths), default=None)
        if length is not None:
            return length if _is_plain(settings) else None
    return None


def _tokens(settings: Mapping[str, Any], name: str) -> int | None:
    found = settings.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 < found <= MOST_TOKENS else None


def _is_plain(settings: Mapping[str, Any]) -> bool:
    return all(kind in _PLAIN for name in ("rope_scaling", "rope_parameters") for kind in _kinds(settings.get(name)))


def _kinds(rope: object) -> Iterator[str]:
    """The kinds of position embedding, one for each kind of layer where these differ."""
    if isinstance(rope, Mapping):
        inner = [part for part in rope.values() if isinstance(part, Mapping)]
        for part in inner or [rope]:
            yield str(part.get("rope_type", part.get("type", "default")))
