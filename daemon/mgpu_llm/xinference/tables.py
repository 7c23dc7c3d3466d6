"""The two tables of facts in this package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import NamedTuple

OLD_VLLM, NEW_VLLM = "0.8.4", "0.32.0"


class Model(NamedTuple):
    """What one combination of Xinference's names means on the Hugging Face hub."""

    name: str
    size: str
    format: str
    quantization: str
    hub_id: str

    @property
    def cache_folder(self) -> str:
        """Below XINFERENCE_HOME/cache, where Xinference 1.4.1 links the files of this model (_get_cache_dir)."""
        suffix = f"-{self.quantization}" if self.quantization in self.hub_id else ""
        return f"{self.name.replace('.', '_')}-{self.format}-{self.size}b{suffix}"


class Option(NamedTuple):
    """One of vLLM's engine options: a "flag", a "switch" or a "value", and the version that has it, or "both"."""

    name: str
    kind: str
    versions: str


@cache
def models() -> tuple[Model, ...]:
    return tuple(Model(*row) for row in _rows("models.tsv"))


@cache
def options() -> dict[str, Option]:
    return {row[0]: Option(*row) for row in _rows("options.tsv")}


def _rows(name: str) -> Iterator[list[str]]:
    text = resources.files("mgpu_llm.xinference").joinpath(name).read_text("utf-8")
    return (line.split("\t") for line in text.splitlines())
