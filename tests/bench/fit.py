"""What is foreseen of a start against what vLLM said: `python -m tests.bench.fit MODEL RECORDING...`.

MODEL is a model's folder, or a shape as hidden,intermediate,layers,heads,key/value heads,vocabulary (Qwen2, not tied, 16 bits).
A recording is one of ours (.jsonl or .jsonl.gz), or a log as vLLM printed it. Without arguments the recordings of tests/data
whose shapes are known. One row a recording, as Markdown.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.config.need import Known, known
from mgpu_llm.config.schema import Config
from mgpu_llm.core.fit import CUDA_PART, GIB, fits, tokens_in

RECORDINGS: Final = Path(__file__).parents[1] / "data" / "recordings"
#: What a shape on the command line names, in this order, as config.json calls it.
SHAPE: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES: Final = {
    "7b": "3584,18944,28,28,4,152064",
    "32b": "5120,27648,64,40,8,152064",
    "72b": "8192,29568,80,64,8,152064",
}
_HEAD: Final = (
    "| recording | weights GiB: foreseen, said, off | tokens from said memory: off | tokens: foreseen, said, off |"
)
_SAID: Final = {
    "weights": r"Model loading took ([\d.]+) GiB",
    "cache": r"Available KV cache memory: ([\d.]+) GiB",
    "tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "total": r"\(\d[\d.]*/(\d[\d.]*) GiB\) on startup",
    "ranks": r"'tensor_parallel_size': (\d+)",
    "utilisation": r"'gpu_memory_utilization': ([\d.]+)",
    "desired": r"[Dd]esired GPU memory utilization is \(([\d.]+),",
    "context": r"'max_model_len': (\d+)",
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What vLLM printed: GiB, tokens, ranks; None for what it did not."""

    weights: float | None
    cache: float | None
    tokens: float | None
    total: float | None
    ranks: int
    utilisation: float


def said(text: str) -> Said:
    found = {name: re.search(pattern, text) for name, pattern in _SAID.items()}
    numbers = {name: float(match[1].replace(",", "")) for name, match in found.items() if match}
    return Said(
        weights=numbers.get("weights"),
        cache=numbers.get("cache"),
        tokens=numbers.get("tokens"),
        total=numbers.get("total"),
        ranks=int(numbers.get("ranks", 1)),
        utilisation=numbers.get("desired", numbers.get("utilisation", 0.92)),
    )


def text_of(file: Path) -> str:
    """The lines that the engine printed."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    if ".jsonl" not in file.name:
        return text
    rows = (json.loads(line) for line in text.splitlines())
    return "\n".join(str(row["line"]) for row in rows if row.get("kind") == "log")


def needed(model: str) -> Known:
    """Raises ValueError where that cannot be told."""
    with tempfile.TemporaryDirectory() as made:
        folder, args = Path(model), tuple[str, ...]()
        if "," in model:
            folder, args = _made(Path(made), [int(size) for size in model.split(",")]), ("--load-format", "dummy")
        config = Config.model_validate({"model": {"path": str(folder)}, "engine": {"args": args}})
        found = known(config, {})
    if isinstance(found, str):
        raise ValueError(found)
    return found


def row(name: str, found: Known, told: Said) -> str:
    """One row of the table. Totals that vLLM did not print leave the last column empty."""
    weights = found.need.weights.on(told.ranks, found.need.pipeline_parallel, found.need.heads)
    cells = [name, _against(weights / GIB, told.weights, ".2f")]
    given = tokens_in(found.need, told.ranks, round((told.cache or 0) * GIB)) if told.cache else None
    cells.append("" if given is None or told.tokens is None else f"{_off(given, told.tokens)}")
    whole = None
    if told.total is not None:
        whole = fits(found.need, told.ranks, told.utilisation, round(told.total * GIB / CUDA_PART)).tokens
    cells.append("" if whole is None else _against(whole, told.tokens, ",.0f"))
    return f"| {' | '.join(cells)} |"


def _made(folder: Path, sizes: Sequence[int]) -> Path:
    settings = dict(zip(SHAPE, sizes, strict=True))
    more = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**settings, **more}))
    return folder


def _against(foreseen: float, told: float | None, how: str) -> str:
    return f"{foreseen:{how}}" if told is None else f"{foreseen:{how}}, {told:{how}}, {_off(foreseen, told)}"


def _off(foreseen: float, told: float) -> str:
    return f"{(foreseen / told - 1) * 100:+.2f} %"


def _own() -> Iterator[tuple[str, Path]]:
    for file in sorted(RECORDINGS.glob("h*.jsonl.gz")):
        size = next((size for size in ("72b", "32b") if size in file.name), "7b")
        yield SHAPES[size], file


def main(args: Sequence[str]) -> int:
    pairs = [(args[0], Path(file)) for file in args[1:]] if args else list(_own())
    print(f"{_HEAD}\n|---|---|---|---|")
    for model, file in pairs:
        told = said(text_of(file))
        if told.weights is not None:
            print(row(file.name.partition(".")[0], needed(model), told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
