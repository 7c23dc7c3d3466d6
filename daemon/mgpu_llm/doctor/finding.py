"""What the doctor says of one thing that was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

#: "unknown" is what could not be looked at: it is neither well nor ill.
Level = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`name` is the check's, stable for scripts; `seen` is a sentence with its figure; `fix` is what to do, a command where there
    is one, "" where there is nothing to be done."""

    name: str
    subject: str
    level: Level
    seen: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What findings are about, and how they are made."""

    title: str

    def ok(self, name: str, seen: str) -> Finding:
        return Finding(name=name, subject=self.title, level="ok", seen=seen)

    def warning(self, name: str, seen: str, fix: str = "") -> Finding:
        """The start may fail of it, or be slow."""
        return Finding(name=name, subject=self.title, level="warning", seen=seen, fix=fix)

    def problem(self, name: str, seen: str, fix: str = "") -> Finding:
        """The start will fail of it."""
        return Finding(name=name, subject=self.title, level="problem", seen=seen, fix=fix)

    def unknown(self, name: str, why: str, fix: str = "") -> Finding:
        return Finding(name=name, subject=self.title, level="unknown", seen=f"not known: {why}", fix=fix)


def gib(count_bytes: float) -> str:
    """As in "1.5 GiB" or "140 GiB"."""
    size = count_bytes / 2**30
    return f"{size:.0f} GiB" if size >= 10 else f"{size:.1f} GiB" if size >= 1 else f"{count_bytes / 2**20:.0f} MiB"


def listed(names: Sequence[str], most: int = 4) -> str:
    """As in "a, b, c and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def document(findings: Sequence[Finding], *, user: str, config: str) -> dict[str, object]:
    """What `mgpud --doctor` prints; `config` is "" where there is none, and the host alone was looked at."""
    return {"user": user, "config": config, "findings": [asdict(finding) for finding in findings]}
