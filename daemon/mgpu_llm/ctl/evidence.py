"""The pages of mgpuctl about incidents, from documents to lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mgpu_llm.ctl.words import Page, columns, plain, span

LABEL = 12


def incidents_lines(incidents: Sequence[Mapping[str, Any]], page: Page) -> list[str]:
    if not incidents:
        return ["no incident is kept"]
    rows = [("INCIDENT", "RUNG", "OUTCOME", "PHASE", "SIZE")]
    for incident in incidents:
        told = [str(incident.get(key, "?")) for key in ("id", "rung", "outcome", "phase")]
        rows.append((told[0], told[1], told[2], told[3], _size(incident.get("bytes"))))
    head, *table = columns(rows)
    lines = [page.paint(head, bold=True)]
    for incident, row in zip(incidents, table, strict=True):
        lines.append(row)
        for key in ("summary", "decision", "unreadable"):
            lines += [f"    {page.paint(line, dim=True)}" for line in page.wrap(str(incident.get(key, "")), 4)]
    return [*lines, "", page.paint("  mgpuctl incident show ID     mgpuctl incident export ID", dim=True)]


def incident_lines(told: Mapping[str, Any], page: Page) -> list[str]:
    failed = f"{told['attempt']} on rung {told['rung']}, {told['outcome']} in {told['phase']}"
    fields = [
        ("When", told.get("at", "")),
        ("Attempt", f"{failed} after {span(float(told['duration_s']))}"),
        ("Cause", told["cause"]),
        ("What", told["summary"]),
        ("To do", told["advice"]),
        ("Then", told.get("decision", "")),
        ("Command", " ".join(map(str, told.get("launch", {}).get("argv", [])))),
        ("Versions", ", ".join(f"{what} {version}" for what, version in told.get("versions", {}).items())),
        ("Recording", told.get("recording", "")),
        ("Folder", told.get("folder", "")),
    ]
    lines = [page.paint(plain(str(told["id"])), bold=True)]
    for label, text in fields:
        lines += _field(label, page.wrap(str(text), LABEL + 2))
    lines += _field("Evidence", [line for seen in told.get("evidence", []) for line in page.wrap(str(seen), LABEL + 2)])
    lines += _field("Files", [f"{plain(str(name))}, {_size(size)}" for name, size in told.get("files", {}).items()])
    missing = [f"{what}: {why}" for what, why in told.get("not_observed", {}).items()]
    return lines + _field("Not seen", [line for text in missing for line in page.wrap(text, LABEL + 2)])


def _field(label: str, values: Sequence[str]) -> list[str]:
    return [f"{label if n == 0 else '':>{LABEL}}{':' if n == 0 else ' '} {value}" for n, value in enumerate(values)]


def _size(size: object) -> str:
    return f"{size / 1024:.1f} KiB" if isinstance(size, int) else ""
