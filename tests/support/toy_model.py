"""Write a toy checkpoint that vLLM serves: a random-weight Qwen2 of a few megabytes with its own byte-level tokenizer.

Only the standard library is needed, and nothing is downloaded. The same arguments give the same bytes, a checkpoint that
is there already is left alone, and a checkpoint is either whole or absent: it is written beside its place and renamed.

Greedy completions are letters and spaces and never end early: every other row of the output layer is zero.
"""

import argparse
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
MAX_TOKENS = 4096
READABLE = frozenset(b"abcdefghijklmnopqrstuvwxyz ")
# Token 0 ends a text, token b + 1 is byte b; rounded up so that every tensor parallel size up to 8 divides it.
VOCABULARY = 264


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a checkpoint; `hidden` over `heads` must be a head size that vLLM's CPU attention knows."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    shards: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads not in (32, 64, 128):
            raise ValueError(
                f"cannot shape a checkpoint: hidden {self.hidden} / heads {self.heads} must be 32, 64 or 128"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"cannot shape a checkpoint: kv_heads {self.kv_heads} must divide heads {self.heads}")
        if not 1 <= self.shards <= self.layers:
            raise ValueError(f"cannot shape a checkpoint: shards {self.shards} must be 1 to layers {self.layers}")


def write_toy_model(folder: Path, shape: Shape) -> bool:
    """Make `folder` hold the checkpoint of `shape`; true if it had to be written.

    Raises FileExistsError if `folder` holds anything else, so that a wrong path never costs somebody's files.
    """
    recipe = json.dumps({"writer": 1, **asdict(shape)})
    mark = folder / "toy.json"
    if mark.is_file() and mark.read_text() == recipe:
        return False
    if folder.exists() and not mark.is_file():
        raise FileExistsError(
            f"cannot write toy model '{folder}': it exists and is not a toy model; name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        _write_config(unfinished, shape)
        _write_tokenizer(unfinished)
        _write_weights(unfinished, shape)
        (unfinished / mark.name).write_text(recipe)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _write_config(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: one token a byte, so any text can be said."""
    special = {
        "id": 0,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {END_OF_TEXT: 0} | {letter: byte + 1 for byte, letter in enumerate(_byte_letters())},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_letters() -> list[str]:
    """The letter for each byte in a byte-level vocabulary: itself if printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _write_weights(folder: Path, shape: Shape) -> None:
    """Shard after shard in the safetensors format: header length (u64), JSON header, the tensors' bytes."""
    noise = random.Random(shape.seed)  # noqa: S311 - repeatable is what it shall be
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in range(shape.shards):
        name = f"model-{shard + 1:05d}-of-{shape.shards:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        body = bytearray()
        for tensor, size in _tensors(shape, shard):
            begin = len(body)
            body += _values(tensor, size, noise)
            header[tensor] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, len(body)]}
            weight_map[tensor] = name
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)
        (folder / name).write_bytes(struct.pack("<Q", len(packed)) + packed + body)
        total_bytes += len(body)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shape: Shape, shard: int) -> Iterator[tuple[str, list[int]]]:
    """Name and size of every tensor of one shard, the layers spread evenly."""
    head = shape.hidden // shape.heads
    if shard == 0:
        yield "model.embed_tokens.weight", [VOCABULARY, shape.hidden]
    for layer in range(shard * shape.layers // shape.shards, (shard + 1) * shape.layers // shape.shards):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", [shape.hidden]
        yield prefix + "post_attention_layernorm.weight", [shape.hidden]
        for projection, rows in (("q", shape.heads * head), ("k", shape.kv_heads * head), ("v", shape.kv_heads * head)):
            yield f"{prefix}self_attn.{projection}_proj.weight", [rows, shape.hidden]
            yield f"{prefix}self_attn.{projection}_proj.bias", [rows]
        yield prefix + "self_attn.o_proj.weight", [shape.hidden, shape.heads * head]
        yield prefix + "mlp.gate_proj.weight", [shape.intermediate, shape.hidden]
        yield prefix + "mlp.up_proj.weight", [shape.intermediate, shape.hidden]
        yield prefix + "mlp.down_proj.weight", [shape.hidden, shape.intermediate]
    if shard == shape.shards - 1:
        yield "model.norm.weight", [shape.hidden]
        yield "lm_head.weight", [VOCABULARY, shape.hidden]


def _values(tensor: str, size: list[int], noise: random.Random) -> bytes:
    """The bfloat16 values of a tensor, little-endian: ones for a norm, otherwise either sign of 2**-7 to 2**-5."""
    count = size[0] * (size[1] if len(size) == 2 else 1)
    if "norm" in tensor:
        return b"\x80\x3f" * count
    drawn = bytearray(noise.randbytes(2 * count))
    drawn[1::2] = bytes(0x3C | byte & 0x80 for byte in drawn[1::2])
    if tensor == "lm_head.weight":
        row_bytes = 2 * size[1]
        for token in range(VOCABULARY):
            if token - 1 not in READABLE:
                drawn[token * row_bytes : (token + 1) * row_bytes] = bytes(row_bytes)
    return bytes(drawn)


def main() -> None:
    defaults = Shape()
    parser = argparse.ArgumentParser(description="Write a toy checkpoint for vLLM.")
    parser.add_argument("folder", type=Path, help="where it shall be; left alone if it is there already")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    arguments = vars(parser.parse_args())
    folder: Path = arguments.pop("folder")
    try:
        written = write_toy_model(folder, Shape(**arguments))
    except (OSError, ValueError) as error:
        parser.exit(os.EX_DATAERR, f"{error}\n")
    print(f"toy model {'written to' if written else 'is at'} {folder}")


if __name__ == "__main__":
    main()
