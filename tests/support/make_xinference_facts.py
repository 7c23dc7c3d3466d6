"""Makes daemon/mgpu_llm/xinference/models.tsv and options.tsv: the facts that `mgpuctl import-xinference` looks up.

    python tests/support/make_xinference_facts.py XINFERENCE OLD_ARG_UTILS NEW_ARG_UTILS

XINFERENCE is the unpacked wheel of Xinference 1.4.1, the others are vllm/engine/arg_utils.py of vLLM 0.8.4 and 0.32.0.

models.tsv has model, size, format, quantization and hub id, in the order in which Xinference looks. From
model/llm/llm_family.json go in: the families named in the VLLM_SUPPORTED lists of model/llm/vllm/core.py; of these the
formats and quantizations that the same file lets vLLM serve (pytorch unquantized, AWQ of 4 bits, GPTQ of 3, 4 or 8 bits,
FP8); of the same model, size, format and quantization the first.

options.tsv has the fields of vLLM's EngineArgs that its command line has, too: name, kind and the versions that know it. A
"flag" is off unless given, a "switch" may be on by default, everything else has a "value".
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parents[2] / "daemon" / "mgpu_llm" / "xinference"
OLD, NEW = "0.8.4", "0.32.0"
#: None by default in 0.8.4, and yet plain flags on its command line.
PLAIN_FLAGS = ("enforce_eager", "enable_reasoning", "calculate_kv_scales")


def main(xinference: Path, old: Path, new: Path) -> None:
    llm = xinference / "xinference" / "model" / "llm"
    served = set(_served((llm / "vllm" / "core.py").read_text("utf-8")))
    models = dict[tuple[str, ...], str]()
    for family in json.loads((llm / "llm_family.json").read_text("utf-8")):
        if family["model_name"] in served:
            for key, hub_id in _specs(family):
                models.setdefault(key, hub_id)
    _write("models.tsv", [(*key, hub_id) for key, hub_id in models.items()])
    _write("options.tsv", sorted(_options(dict(_fields(old)), dict(_fields(new)))))


def _served(source: str) -> Iterator[str]:
    """The names in the VLLM_SUPPORTED lists, those appended for newer vLLM included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.List(elts=items))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.List(elts=items))
                | ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=items)
            ) if name.startswith("VLLM_SUPPORTED"):
                yield from (str(item.value) for item in items if isinstance(item, ast.Constant))


def _specs(family: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for spec in family["model_specs"]:
        kind, size = spec["model_format"], str(spec["model_size_in_billions"])
        for quantization in spec["quantizations"]:
            if _fits(kind, quantization):
                key = (family["model_name"], size, kind, quantization)
                yield key, spec["model_id"].format(quantization=quantization)


def _fits(kind: str, quantization: str) -> bool:
    match kind:
        case "pytorch":
            return quantization == "none"
        case "awq":
            return "4" in quantization
        case "gptq":
            return any(bits in quantization for bits in "348")
        case _:
            return kind == "fp8"


def _fields(arg_utils: Path) -> Iterator[tuple[str, str]]:
    source = arg_utils.read_text("utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs"):
            declared = (field for field in node.body if isinstance(field, ast.AnnAssign))
            for field in declared:
                name = ast.unparse(field.target)
                if re.search(f"""["']--{name.replace("_", "-")}["']""", source):
                    yield name, _kind(field)


def _kind(field: ast.AnnAssign) -> str:
    kinds = {part.strip() for part in ast.unparse(field.annotation).removeprefix("Optional[").rstrip("]").split("|")}
    if not kinds <= {"bool", "None"}:
        return "value"
    default = ast.unparse(field.value) if field.value else ""
    # All that ParallelConfig gives a default to is off there (0.8.4, 0.32.0).
    return "flag" if default == "False" or default.startswith("ParallelConfig.") else "switch"


def _options(old: dict[str, str], new: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for name in old.keys() | new.keys():
        versions = "both" if name in old and name in new else OLD if name in old else NEW
        kind = "flag" if name in PLAIN_FLAGS else old.get(name, new.get(name, "value"))
        yield name, kind, versions


def _write(name: str, rows: list[tuple[str, ...]]) -> None:
    (FACTS / name).write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
