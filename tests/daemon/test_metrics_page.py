"""docs/metrics.md has every metric and every alert, as the code and the rules have them."""

from __future__ import annotations

import re

from mgpu_llm.core.metrics import FAMILIES
from tests.support.monitoring import alerts
from tests.support.toy_setup import ROOT

PAGE = (ROOT / "docs/metrics.md").read_text()


def table(name: str) -> str:
    return PAGE.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(
            " | ".join([f"| `{family.full_name}`", family.kind, labels, family.help]).replace("|  |", "| |") + " |"
        )
    assert table("metrics").splitlines() == rows


def test_the_table_of_alerts_is_that_of_the_rules() -> None:
    rows = ["| alert | severity | after | when |", "|---|---|---|---|"]
    for name, rule in alerts().items():
        severity, summary = (re.search(rf" {key}: (.*)\n", rule) for key in ("severity", "summary"))
        after = re.search(r"^        for: (.*)\n", rule, re.MULTILINE)
        assert severity is not None
        assert summary is not None
        told = re.sub(r" on \{\{ \$labels\.instance \}\}", "", summary[1])
        told = re.sub(r"\{\{ \$labels\.\w+ \}\}", "...", told)
        rows.append(f"| `{name}` | {severity[1]} | {after[1] if after else 'at once'} | {told} |")
    assert table("alerts").splitlines() == rows
