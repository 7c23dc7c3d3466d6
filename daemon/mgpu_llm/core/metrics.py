"""What a monitoring system is told: every metric with its help, and its values at one moment, read off the status.

Names and units follow Prometheus' conventions (prometheus.io/docs/practices/naming): seconds, bytes, ratios from 0 to 1, counters
that end in _total. What is not observed has no value; it is never 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, get_args

from mgpu_llm.core import report, tally
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.report import Identity
from mgpu_llm.core.states import Policy, Starting, State
from mgpu_llm.core.status import Status
from mgpu_llm.core.tally import Tally


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True)
class Family:
    """One metric: its name without prefix, what it means, and the names of its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return f"mgpu_llm_{self.name}"


#: The values of a metric by those of its labels, in the order of `Family.labels`.
Values = Mapping[tuple[str, ...], float]

STATES: Final = tuple(state.__name__.lower() for state in get_args(State))
PHASES: Final = ("preflight", *(phase.label for phase in Phase), "serving")


def _gauge(name: str, help: str, *labels: str) -> Family:  # noqa: A002 - what Prometheus calls it
    return Family(name, Kind.GAUGE, help, labels)


def _counter(name: str, help: str, *labels: str) -> Family:  # noqa: A002
    return Family(name, Kind.COUNTER, help, labels)


FAMILIES: Final = (
    _gauge("build_info", "Version of mgpud; always 1.", "version"),
    _gauge("model_info", "The model as clients ask for it, and where it is served; always 1.", "model", "url"),
    _gauge("state", "1 for the state that the supervisor is in, 0 for each other.", "state"),
    _gauge("phase", "1 for the present phase of the load, or for serving; 0 for each other.", "phase"),
    _gauge("phase_progress_ratio", "Part of the present phase that is done, where it can be counted."),
    _gauge("load_elapsed_seconds", "Time since the engine that loads was begun."),
    _gauge("load_left_seconds", "Estimated time until the engine that loads serves, if there is anything to go by."),
    _gauge("weights_read_bytes_per_second", "Rate at which the weights come in, while they do."),
    _gauge("quiet_seconds", "Time in which nothing of the load has moved, up to now."),
    _gauge("patience_seconds", "Quiet after which the load is suspected to be stalled, in its present phase."),
    _gauge("longest_quiet_seconds", "Longest time in which nothing moved, of this load, or of the last."),
    _gauge(
        "time_to_ready_seconds", "Time from when the service was last wanted until it was there, failures included."
    ),
    _gauge("load_seconds", "Time that the last attempt which came to service took by itself."),
    _counter("ready_total", "Times that the model has come to service."),
    _counter("attempts_total", "Attempts that are over, by how and why; none: it was stopped.", "outcome", "cause"),
    _counter("engine_starts_total", "Engines that were begun."),
    _counter("engine_deaths_total", "Engines that died, or stopped answering, while they served."),
    _gauge("retry_in_seconds", "Time until the next attempt, while one is waited for."),
    _gauge("rung_info", "Rung of the present or last attempt, base for the config's own settings; always 1.", "rung"),
    _gauge("degraded", "Whether the model is served on a rung other than base."),
    _gauge("engine_processes", "Processes of the engine when last looked at."),
    _counter("engine_lines_dropped_total", "Lines that the engine printed too fast to be read, which are lost."),
    _gauge("gpu_memory_used_bytes", "Memory that is in use on a GPU of the engine, by anybody.", "gpu", "uuid"),
    _gauge("gpu_memory_total_bytes", "Memory that a GPU of the engine has.", "gpu", "uuid"),
    _gauge("gpu_out", "Whether a GPU, or a spare, must not be used any more until it is reset.", "gpu"),
    _gauge("gpu_faults", "Faults of GPUs with which the present engine goes on."),
)


def read(
    state: State, policy: Policy, at: float, identity: Identity, counted: Tally
) -> Iterator[tuple[Family, Values]]:
    """Every metric of FAMILIES with its values at `at`, seconds on the clock of the events."""
    status = report.status(state, policy, at, identity)
    quiet_s = tally.longest_quiet_s(state) if isinstance(state, Starting) else counted.quiet_s
    found: dict[str, Values] = {
        "build_info": {(identity.version,): 1.0},
        "model_info": {(identity.model, identity.url): 1.0},
        "state": _one_of(STATES, status.state),
        "phase": _one_of(PHASES, status.phase),
        "rung_info": {(status.rung,): 1.0},
        "degraded": _value(status.degraded),
        "retry_in_seconds": _value(status.retry_in_s),
        "longest_quiet_seconds": _value(quiet_s),
        "gpu_out": {(gpu,): float(gpu in state.run.out) for gpu in (*policy.uuids, *state.run.out)},
        **_load(status),
        **_engine(status),
        **_counted(counted),
    }
    return ((family, found[family.name]) for family in FAMILIES)


def _load(status: Status) -> dict[str, Values]:
    """What there is only of an engine that loads."""
    loading = status.quiet_s is not None
    percent = next((phase.percent for phase in status.phases if phase.standing == "current"), None)
    return {
        "phase_progress_ratio": _value(None if percent is None else percent / 100),
        "load_elapsed_seconds": _value(status.elapsed_s if loading else None),
        "load_left_seconds": _value(status.left_s),
        "weights_read_bytes_per_second": _value(status.weights_bytes_per_s),
        "quiet_seconds": _value(status.quiet_s),
        "patience_seconds": _value(status.patience_s),
    }


def _engine(status: Status) -> dict[str, Values]:
    gpus = [((gpu.entry, gpu.uuid), gpu) for gpu in status.gpus]
    return {
        "engine_processes": _value(status.processes),
        "engine_lines_dropped_total": _value(status.lines_dropped),
        "gpu_memory_used_bytes": {names: float(gpu.used_bytes) for names, gpu in gpus},
        "gpu_memory_total_bytes": {names: float(gpu.total_bytes) for names, gpu in gpus if gpu.total_bytes is not None},
        "gpu_faults": _value(len(status.gpu_faults)),
    }


def _counted(counted: Tally) -> dict[str, Values]:
    return {
        "time_to_ready_seconds": _value(counted.ready_s),
        "load_seconds": _value(counted.load_s),
        "ready_total": _value(counted.services),
        "attempts_total": {key: float(count) for key, count in counted.ended.items()},
        "engine_starts_total": _value(counted.starts),
        "engine_deaths_total": _value(counted.deaths),
    }


def _value(value: float | None) -> Values:
    return {} if value is None else {(): float(value)}


def _one_of(names: tuple[str, ...], now: str) -> Values:
    return {(name,): float(name == now) for name in names}
