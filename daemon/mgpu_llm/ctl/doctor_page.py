"""What the doctor has found as people read it: what is well first, what to do last, where the eye is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.words import Page, plain

#: By level: its heading, its word for one and for several, and its colour; in the order of the page.
LEVELS: Final = {
    "ok": ("Well", "ok", "ok", "green"),
    "unknown": ("Not known", "not known", "not known", None),
    "warning": ("Warnings", "warning", "warnings", "yellow"),
    "problem": ("Problems", "problem", "problems", "red"),
}
LABEL: Final = 9
MARGIN: Final = LABEL + 4


def doctor_lines(document: Mapping[str, Any], page: Page) -> list[str]:
    """`document` is what `mgpud --doctor` prints. Raises LookupError, TypeError and the like where it is none."""
    lines = list[str]()
    for level, (heading, _, _, colour) in LEVELS.items():
        found = [finding for finding in document["findings"] if finding["level"] == level]
        if found:
            lines += [page.paint(f"{heading}:", colour, bold=True)]
            lines += [line for finding in found for line in _finding(finding, page)] + [""]
    return [*lines, *_summary(document, page)]


def worst(document: Mapping[str, Any]) -> int:
    """The exit status."""
    levels = {finding["level"] for finding in document["findings"]}
    if "problem" in levels:
        return exits.PROBLEMS
    return exits.WARNINGS if "warning" in levels else exits.DONE


def _finding(finding: Mapping[str, str], page: Page) -> list[str]:
    # Its heading has said so.
    seen = page.wrap(finding["seen"].removeprefix("not known: "), MARGIN)
    label = f"  {plain(finding['subject']):<{LABEL}}  "
    lines = [f"{label if n == 0 else ' ' * MARGIN}{line}" for n, line in enumerate(seen)]
    cure = page.wrap(finding["fix"], MARGIN + 5)
    return lines + [f"{' ' * MARGIN}{'fix: ' if n == 0 else '     '}{line}" for n, line in enumerate(cure)]


def _summary(document: Mapping[str, Any], page: Page) -> list[str]:
    counts = Counter(str(finding["level"]) for finding in document["findings"])
    words = [
        f"{counts[level]} {one if counts[level] == 1 else several}"
        for level, (_, one, several, _) in reversed(LEVELS.items())
        if counts[level]
    ]
    config = f"config {plain(document['config'])}" if document["config"] else "without a config: the host alone"
    told = f"{', '.join(words)}; as user {plain(document['user'])}, {config}"
    worst_level = next((level for level in reversed(LEVELS) if counts[level]), "ok")
    return [page.paint(line, LEVELS[worst_level][3], bold=True) for line in page.wrap(told, 0)]
