"""What has happened: facts in the past tense, as the adapters saw them.

Every event carries `at`, seconds on the monotonic clock of the daemon. Events about an engine carry its `attempt`, so that
a late word from a dead attempt can be told apart and dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgpu_llm.core.preflight import Checked
from mgpu_llm.core.xid import Action


@dataclass(frozen=True, kw_only=True)
class StartRequested:
    """Bring the engine to service: at the daemon's start, or by `mgpuctl start`."""

    at: float


@dataclass(frozen=True, kw_only=True)
class StopRequested:
    """End the engine. `final`: the daemon itself is to end too (SIGTERM from systemd, Ctrl-C)."""

    at: float
    final: bool
    by: str


@dataclass(frozen=True, kw_only=True)
class RestartRequested:
    """End the engine and start it anew, on the rung that served last (`mgpuctl restart`)."""

    at: float
    by: str


@dataclass(frozen=True, kw_only=True)
class ForgetRequested:
    """Forget which rung served last: the next start begins with the admin's own settings (`mgpuctl forget`)."""

    at: float
    by: str


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """Time has passed; nothing else happened."""

    at: float


@dataclass(frozen=True, kw_only=True)
class EngineSpawned:
    """`taken` says of each GPU of which others held much before that, who does."""

    at: float
    attempt: int
    pid: int
    taken: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineSpawnFailed:
    """No process came to be. `hopeless`: another try cannot succeed until somebody changes something. `rank`: it was spared the
    load, as others hold that rank's GPU."""

    at: float
    attempt: int
    reason: str
    hopeless: bool = False
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineExited:
    """The top process ended. `status` as subprocess gives it: exit code, or minus the signal's number."""

    at: float
    attempt: int
    status: int


@dataclass(frozen=True, kw_only=True)
class EngineGone:
    """After KillEngine: no process of the attempt is left. `remarks` says what could not be made clean; `dirty` are the GPUs
    that are not free although nobody uses them, each an entry of CUDA_VISIBLE_DEVICES with a sentence."""

    at: float
    attempt: int
    remarks: tuple[str, ...] = ()
    dirty: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class IncidentKept:
    """After KeepIncident: what could be seen of the attempt is on disk, under this id."""

    at: float
    attempt: int
    incident: str


@dataclass(frozen=True, kw_only=True)
class EngineStuck:
    """After KillEngine: these processes outlived SIGKILL; `holders` names each ("pid 71 (VLLM::Worker, state D)"), and `dirty`
    are the GPUs that they keep, as in EngineGone."""

    at: float
    attempt: int
    holders: tuple[str, ...]
    dirty: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LineRead:
    """One line of the engine's output, without its line end, with terminal colours removed."""

    at: float
    attempt: int
    text: str


@dataclass(frozen=True, kw_only=True)
class LinesDropped:
    """The engine printed faster than lines can be judged; `count` lines were read and thrown away."""

    at: float
    attempt: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ProcessSample:
    """One process of the engine's tree, from /proc. Counters only grow; sizes are bytes, times seconds.

    `read_chars` and `read_bytes` are rchar and read_bytes of /proc/PID/io (None where it may not be read).
    `started` (clock ticks since boot) tells a process from a later one with the same pid.
    """

    pid: int
    started: int
    name: str
    state: str
    cpu_s: float
    major_faults: int
    rss_bytes: int
    read_chars: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ProcessesSampled:
    at: float
    attempt: int
    processes: tuple[ProcessSample, ...]


@dataclass(frozen=True, kw_only=True)
class GpuSample:
    """One GPU of the launch. Memory excludes the driver's reserve; None is "not observed", never 0.

    `processes` are those that compute on it, as (pid, bytes), with pids as the driver counts them: in a container they may
    be nobody's that we know.
    """

    uuid: str
    used_bytes: int
    total_bytes: int | None = None
    utilisation_percent: int | None = None
    power_mw: int | None = None
    processes: tuple[tuple[int, int | None], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GpusSampled:
    at: float
    attempt: int
    gpus: tuple[GpuSample, ...]


@dataclass(frozen=True, kw_only=True)
class GpusUnobserved:
    at: float
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class HostSampled:
    """How much of the last ten seconds everybody who wanted to work waited for memory, or for storage, in percent: the
    "full" line of Linux's pressure stall information, of the engine's cgroup where it has one. None is "not observed"."""

    at: float
    attempt: int
    memory_percent: float | None = None
    storage_percent: float | None = None


@dataclass(frozen=True, kw_only=True)
class KernelSaid:
    """One line of the kernel's log while the engine ran, of those that may explain a failure. `elsewhere`: it is about PCI
    devices that are none of the launch's GPUs; `gpus` are those of the launch's that it names, as entries of
    CUDA_VISIBLE_DEVICES."""

    at: float
    attempt: int
    text: str
    elsewhere: bool = False
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GpuUnfit:
    """NVML has come to say that one of the launch's GPUs, an entry of CUDA_VISIBLE_DEVICES, cannot go on as it is. `action` is
    what has to be done, as in core/xid.Action: lost, reset, reboot, drain; `what` says it in NVML's words."""

    at: float
    attempt: int
    gpu: str
    what: str
    action: Action


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where one thread stands.

    `frames` are its Python functions, innermost first, as "function (folder/file.py:line)"; empty for a thread that runs no
    Python, or whose process may not be looked into. `waits_in` is the kernel function in which it sleeps, "" while it runs
    or where the kernel does not tell. `thread` is the kernel's number of the thread, `name` what Python calls it.
    """

    pid: int
    thread: int
    process: str
    name: str = ""
    state: str = ""
    frames: tuple[str, ...] = ()
    waits_in: str = ""


@dataclass(frozen=True, kw_only=True)
class StacksTaken:
    """After TakeStacks: the threads of every engine process. `unobserved` says why the Python frames of some could not be
    had, "" when all were."""

    at: float
    attempt: int
    stacks: tuple[Stack, ...]
    unobserved: str = ""


@dataclass(frozen=True, kw_only=True)
class Preflighted:
    """After BeginPreflight: what was found of the attempt's GPUs. Nothing of the check is left on them."""

    at: float
    attempt: int
    checked: Checked


@dataclass(frozen=True, kw_only=True)
class HealthProbed:
    """GET /health was answered, or not. `healthy` only for status 200."""

    at: float
    attempt: int
    healthy: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class CompletionProbed:
    """A one-token request was answered, or not. `hopeless`: the server says that this request can never succeed."""

    at: float
    attempt: int
    served: bool
    detail: str
    hopeless: bool = False


EngineEvent = (
    EngineSpawned
    | EngineSpawnFailed
    | EngineExited
    | EngineGone
    | EngineStuck
    | IncidentKept
    | LineRead
    | LinesDropped
    | ProcessesSampled
    | GpusSampled
    | GpusUnobserved
    | HostSampled
    | KernelSaid
    | GpuUnfit
    | StacksTaken
    | Preflighted
    | HealthProbed
    | CompletionProbed
)
Request = StartRequested | StopRequested | RestartRequested | ForgetRequested
Event = Request | Ticked | EngineEvent
