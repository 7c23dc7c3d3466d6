"""What joins the GPUs, in the letters of `nvidia-smi topo -m`, and where they cannot reach each other's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mgpu_llm.ctl.words import Page, plain

#: NVML's levels in nvidia-smi's letters; all but the first are as its legend has them.
LETTERS: Final = {
    "internal": "PIX",
    "single": "PIX",
    "multiple": "PXB",
    "hostbridge": "PHB",
    "node": "NODE",
    "system": "SYS",
}
LEGEND: Final = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a host bridge",
    "NODE": "the bridges of one NUMA node",
    "SYS": "the link between NUMA nodes",
    "?": "not told",
}
#: Behind the letters of two GPUs that cannot reach each other's memory.
REFUSED: Final = "!"
#: "NODE!" and the space before it.
COLUMN: Final = 6
LABEL: Final = 5
OK: Final = "ok"

Pairs = Mapping[tuple[int, int], Mapping[str, Any]]


def topology_lines(document: Mapping[str, Any], page: Page) -> list[str]:
    """The matrix, in several parts where it is wider than the page, and what its letters mean; nothing for a single GPU."""
    pairs: Pairs = {(int(pair["gpus"][0]), int(pair["gpus"][1])): pair for pair in document["pairs"]}
    numbers = sorted({number for pair in pairs for number in pair})
    if not numbers:
        return []
    room = len(numbers) if page.width is None else max((page.width - LABEL) // COLUMN, 1)
    most = -(-len(numbers) // -(-len(numbers) // room))  # as many in each part
    parts = [numbers[start : start + most] for start in range(0, len(numbers), most)]
    lines = [line for part in parts for line in _part(numbers, part, pairs)]
    seen = {_letters(pair) for pair in pairs.values()}
    legend = ", ".join(f"{letters} {words}" for letters, words in LEGEND.items() if letters in seen)
    return [*lines, *page.wrap(legend, 0), *(line for text in _refusals(pairs) for line in page.wrap(text, 0))]


def _part(numbers: Sequence[int], columns: Sequence[int], pairs: Pairs) -> list[str]:
    rows = [("", [f"GPU{column}" for column in columns])]
    rows += [(f"GPU{row}", [_cell(row, column, pairs) for column in columns]) for row in numbers]
    return [f"{label:<{LABEL}}{''.join(f' {cell:<{COLUMN - 1}}' for cell in told)}".rstrip() for label, told in rows]


def _cell(row: int, column: int, pairs: Pairs) -> str:
    if row == column:
        return "X"
    pair = pairs.get((min(row, column), max(row, column)))
    return "?" if pair is None else _letters(pair) + (REFUSED if _refusal(pair) else "")


def _letters(pair: Mapping[str, Any]) -> str:
    return "NV" if pair["nvlink"] else LETTERS.get(pair["path"], "?")


def _refusal(pair: Mapping[str, Any]) -> str:
    """Why the two cannot reach each other's memory, "" where they can or nobody tells."""
    read, write = pair["p2p_read"], pair["p2p_write"]
    if read in (None, OK) and write in (None, OK):
        return ""
    if read == write:
        return str(read)
    whys = [f"{what}: {why}" for what, why in (("read", read), ("write", write)) if why not in (None, OK)]
    return ", ".join(whys)


def _refusals(pairs: Pairs) -> list[str]:
    by_why: dict[str, list[str]] = {}
    for (one, other), pair in pairs.items():
        if why := _refusal(pair):
            by_why.setdefault(why, []).append(f"{one}-{other}")
    return [
        f"{REFUSED} no peer-to-peer between {'any two' if len(which) == len(pairs) > 1 else 'GPU ' + ', '.join(which)}: "
        f"the driver says {plain(why)}"
        for why, which in by_why.items()
    ]
