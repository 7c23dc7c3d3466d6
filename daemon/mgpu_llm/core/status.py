"""What people are told: the shapes behind `mgpuctl status`, STATUS= and the live line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Count:
    """So many of so many: shards, graphs."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class GpuStatus:
    """One GPU of the launch as last seen. Bytes and percent; None is "not observed"."""

    uuid: str
    used_bytes: int
    utilisation_percent: int | None


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One run of the engine. `outcome`: running, ready, stopped, stalled, crashed, refused or died (while serving)."""

    number: int
    rung: str
    outcome: str
    phase: str
    duration_s: float
    ended_ago_s: float | None
    cause: str
    summary: str
    advice: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RungStatus:
    """One rung as it would be tried. `standing`: tried, current, next, later."""

    name: str
    changes: tuple[str, ...]
    cost: str
    standing: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """Everything at one moment. Times are seconds; `headline` is the one line that systemd shows as STATUS=."""

    state: str
    headline: str
    version: str
    model: str
    url: str
    pid: int | None
    attempt: int
    rung: str
    degraded: bool
    changes: tuple[str, ...]
    cost: str
    phase: str
    elapsed_s: float
    quiet_s: float | None
    patience_s: float | None
    shards: Count | None
    graphs: Count | None
    gpus: tuple[GpuStatus, ...]
    gpus_unobserved: str
    retry_in_s: float | None
    processes: int
    lines_dropped: int
    attempts: tuple[AttemptStatus, ...]
