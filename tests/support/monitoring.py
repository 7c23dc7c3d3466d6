"""What is shipped for Prometheus and Grafana, and what it asks for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.toy_setup import ROOT

RULES: Final = ROOT / "packaging/prometheus/mgpu-llm.rules.yml"
SCRAPE: Final = ROOT / "packaging/prometheus/scrape.example.yml"
DASHBOARD: Final = ROOT / "packaging/grafana/mgpu-llm.json"
_WORDS: Final = frozenset(["and", "or", "unless", "bool", "offset"])

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def alerts() -> dict[str, str]:
    """The text of each alert's rule by its name."""
    _, *parts = re.split(r"^      - alert: (\w+)\n", RULES.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def exprs() -> Iterator[tuple[str, str]]:
    """(where, expression) of everything that asks for metrics: alerts, panels, variables."""
    for name, rule in alerts().items():
        [expr] = re.findall(r"^        expr: (>-\n(?:          .*\n)+|.*\n)", rule, re.MULTILINE)
        yield name, " ".join(expr.removeprefix(">-").split())
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"].removeprefix("label_values(").rpartition(",")[0]


def metrics_in(expr: str) -> set[str]:
    """The metrics that an expression asks for: its names, without those of functions, labels and words of the language."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*(?!\w|\s*\()", bare)) - _WORDS


def label_values_in(expr: str) -> Iterator[tuple[str, str, set[str]]]:
    """(metric, label, values) of each of our own labels that an expression selects by."""
    for name, selected in re.findall(r"(mgpu_llm_\w+)\{([^}]*)\}", expr):
        for label, wanted in re.findall(r'(\w+)=~?"([^"]*)"', selected):
            if label not in ("job", "instance"):
                yield name, label, set(wanted.split("|"))


def promtool(*words: str | Path, given: str = "") -> str:
    """What promtool says, of something that it finds nothing wrong with."""
    asked = subprocess.run(["promtool", *words], input=given, capture_output=True, text=True, check=False, timeout=60)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    return asked.stdout + asked.stderr
