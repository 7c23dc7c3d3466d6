"""Checkpoints made small: real safetensors headers, and data that is a hole in the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from mgpu_llm.config.architecture import tensors
from mgpu_llm.core.sharding import Tensor

#: The shapes of Qwen2.5-7B and -72B.
QWEN_7B: Final[Mapping[str, object]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_72B: Final[Mapping[str, object]] = {
    **QWEN_7B,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def header_of(made: Iterable[Tensor]) -> tuple[bytes, int]:
    """A header as safetensors writes it, and how long the data after it is."""
    told, end = dict[str, object](), 0
    for tensor in made:
        told[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    return json.dumps({"__metadata__": {"format": "pt"}, **told}).encode(), end


def write_file(file: Path, made: Iterable[Tensor]) -> int:
    """Returns how many bytes of it are header."""
    text, data = header_of(made)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + data)
    return 8 + len(text)


def write_model(folder: Path, settings: Mapping[str, object], *, shards: int = 1) -> Path:
    """A model of a plain dense shape, in so many files with an index; one has none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    made = tensors(settings)
    assert made is not None
    if shards == 1:
        write_file(folder / "model.safetensors", made)
        return folder
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    index = {tensor.name: names[place * shards // len(made)] for place, tensor in enumerate(made)}
    for name in names:
        write_file(folder / name, [tensor for tensor in made if index[tensor.name] == name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
