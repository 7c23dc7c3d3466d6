"""What is to be done: imperatives as data, carried out by the runner and its adapters, answered by events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.launch import Launch


class Level(StrEnum):
    """error: act now; warning: degraded; info: a transition; debug: the engine's and the heartbeat's small talk."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


@dataclass(frozen=True, kw_only=True)
class SpawnEngine:
    """Spawn it, unless less than the fraction in `needs_free` is free on one of these GPUs, entries of CUDA_VISIBLE_DEVICES.
    Answered by EngineSpawned or EngineSpawnFailed."""

    attempt: int
    launch: Launch
    needs_free: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BeginPreflight:
    """Check the GPUs of a launch, and by which of these `transports` they reach each other: variables by name, the launch's own
    first. `anew`: whatever has passed before, a load has failed since then. Answered by Preflighted."""

    attempt: int
    gpus: tuple[str, ...]
    launch: Launch
    transports: Mapping[str, Mapping[str, str]]
    anew: bool = False


@dataclass(frozen=True, kw_only=True)
class EndPreflight:
    """Nobody waits for its answer any more: away with it. KillEngine ends it too."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class TerminateEngine:
    """SIGTERM to the top process: a serving engine then ends by itself. Answered by EngineExited, if it listens."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class KillEngine:
    """End every process of the attempt, wait for its GPU memory, remove what it left. Answered by EngineGone or EngineStuck."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class KeepIncident:
    """Keep what can be seen of an attempt that has failed, before KillEngine, which waits for it. Answered by IncidentKept
    once the incident of this id is whole on disk; not at all where that cannot be."""

    attempt: int
    incident: str
    rung: str
    phase: str
    outcome: str
    cause: str
    summary: str
    advice: str
    evidence: tuple[str, ...]
    duration_s: float
    decision: str
    launch: Launch


@dataclass(frozen=True, kw_only=True)
class AbandonIncident:
    """Somebody wants the engine gone now: keep nothing more of it."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class TakeStacks:
    """See where every thread of the engine stands, without stopping any. Answered by StacksTaken."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class ProbeHealth:
    attempt: int


@dataclass(frozen=True, kw_only=True)
class ProbeCompletion:
    attempt: int


@dataclass(frozen=True, kw_only=True)
class RememberStart:
    """The engine has come to service: keep what the start needed, by phase label, for the next starts of this host.
    `launch` is its key, `phase_s` how long each phase took, `quiet_s` the longest quiet in it."""

    launch: str
    duration_s: float
    phase_s: Mapping[str, float]
    quiet_s: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RememberRung:
    """Keep the rung with which the next start shall begin, or None: with the base."""

    known: KnownGood | None


@dataclass(frozen=True, kw_only=True)
class NotifyReady:
    """READY=1 to systemd: a completion came back."""


@dataclass(frozen=True, kw_only=True)
class ExtendTimeout:
    """EXTEND_TIMEOUT_USEC: progress was real, systemd may wait this much longer for the start or the stop."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class NotifyStopping:
    """STOPPING=1 to systemd."""


@dataclass(frozen=True, kw_only=True)
class Announce:
    """One line for the journal: a constant dotted name and its facts."""

    name: str
    level: Level = Level.INFO
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Exit:
    """End the daemon with this exit status; `message` is the last word to the operator ("" after a requested stop)."""

    status: int
    message: str = ""


EngineEffect = (
    SpawnEngine
    | BeginPreflight
    | EndPreflight
    | TerminateEngine
    | KillEngine
    | KeepIncident
    | AbandonIncident
    | TakeStacks
    | ProbeHealth
    | ProbeCompletion
)
Effect = EngineEffect | RememberStart | RememberRung | NotifyReady | ExtendTimeout | NotifyStopping | Announce | Exit
