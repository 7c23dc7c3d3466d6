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
    """One GPU of the launch as last seen. Bytes and percent; None is "not observed". `entry` is what the engine calls it in
    CUDA_VISIBLE_DEVICES, mostly its index; "" where that is not known."""

    uuid: str
    used_bytes: int
    utilisation_percent: int | None
    total_bytes: int | None = None
    entry: str = ""


@dataclass(frozen=True, kw_only=True)
class PhaseStatus:
    """One phase of the load, in the order of the load. `standing`: done, current, to-come.

    `took_s` is how long it has taken so far, None if it has not begun; `usual_s` how long it took in this host's last
    successful start of the same launch. `percent` is how much of it is done, where that can be counted. After `patience_s`
    of quiet it counts as suspect; `learnt` says that this host's own starts have made that longer than the config.
    """

    name: str
    standing: str
    took_s: float | None
    usual_s: float | None
    percent: float | None
    patience_s: float
    learnt: bool


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One run of the engine. `outcome`: running, ready, stopped, stalled, crashed, refused or died (while serving).
    `incident` is the id under which its evidence is kept, "" where none is."""

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
    incident: str = ""


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """What an engine that serves on a rung of ours has given up: since when that rung has served (UTC), the `cause` why the
    admin's own settings did not, what it `cost`s, and how to come back."""

    since: str
    cause: str
    changes: tuple[str, ...]
    cost: str
    way_back: str


@dataclass(frozen=True, kw_only=True)
class RungStatus:
    """One rung as it would be tried where the cause is not known. `standing`: tried (and failed), passed (without an attempt),
    current, next, later."""

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
    #: Of a load: its phases, how much of the weights is in (percent and bytes a second), about how long it takes until it
    #: serves, and what is thought of a quiet that lasts ("": nothing).
    phases: tuple[PhaseStatus, ...] = ()
    weights_percent: float | None = None
    weights_bytes_per_s: float | None = None
    left_s: float | None = None
    suspicion: str = ""
    degradation: Degradation | None = None
    #: A sentence for each GPU that must not be used any more: why, and what to do.
    gpus_out: tuple[str, ...] = ()
    #: How the check of the GPUs before or beside a load goes or went ("": none).
    preflight: str = ""
    #: Faults of the GPUs with which the engine goes on.
    gpu_faults: tuple[str, ...] = ()
