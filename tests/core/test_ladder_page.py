"""docs/ladder.md tells of every remedy with what it really changes, and of every area."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.core.remedies import FIXED, Area, Remedy

PAGE = (Path(__file__).resolve().parents[2] / "docs/ladder.md").read_text()


@pytest.mark.parametrize("remedy", FIXED.values(), ids=lambda remedy: remedy.name)
def test_the_page_has_every_remedy_with_its_changes_and_its_area(remedy: Remedy) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{remedy.name}` |")]
    changes = [*(f"{name}={value}" for name, value in remedy.env.items()), " ".join(remedy.args)]
    assert all(f"`{change}`" in row for change in changes if change)
    assert row.endswith(f"| `{remedy.area}` |")


@pytest.mark.parametrize("area", Area)
def test_the_page_has_every_area(area: Area) -> None:
    assert f"`{area}`" in PAGE
