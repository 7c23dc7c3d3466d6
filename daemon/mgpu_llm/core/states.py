"""The states of the supervisor, one frozen dataclass each, and what lasts from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from mgpu_llm.core import launch as launches
from mgpu_llm.core import stall
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.engine_log import Line, Phase
from mgpu_llm.core.history import PastStart, launch_key, longest_quiet
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import BASE, Ladder, Rung
from mgpu_llm.core.launch import Launch, Server
from mgpu_llm.core.preflight import Checked, When
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from mgpu_llm.core.suspicion import Suspicion

#: Ended attempts that are remembered; a daemon that serves for months must not grow.
LONGEST_HISTORY = 100


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the config decided, and what this host's own starts have taught. Times are seconds. `server` and `uuids` (by entry of
    CUDA_VISIBLE_DEVICES) are there to tell launches apart in the history. `weights_bytes` is the size of the model's files, None
    where it is not known. `incidents` is the folder in which failed attempts are kept, "" where none are, and `utc_s` what the
    wall clock said (seconds since 1970) when the events' clock was at 0. `key` is what a rung that serves depends on, `boot` the
    boot of this host; `preflight` is when GPUs are checked, which takes `preflight_s` at most; after `up_after` planned starts
    one rung up is tried (0: never). `free_is_compared`: this vLLM ends at once where less is free than it is told to take. `seed`
    makes the jitter."""

    ladder: Ladder
    patience: Mapping[Phase, float] = field(default_factory=lambda: dict(DEFAULT_PATIENCE_S))
    server: Server | None = None
    uuids: Mapping[str, str] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    boot: str = ""
    preflight: When = When.OFF
    preflight_s: float = 45.0
    up_after: int = 10
    free_is_compared: bool = False
    incidents: str = ""
    utc_s: float = 0.0
    past: tuple[PastStart, ...] = ()
    learn_factor: float | None = 5.0
    look_at_stacks: bool = True
    weights_bytes: int | None = None
    attempts: int = 12
    tries_per_cause: int = 8
    crashes_per_rung: int = 2
    backoff_s: float = 2.0
    backoff_ceiling_s: float = 60.0
    backoff_jitter: float = 0.0
    seed: int = 0
    probe_interval_s: float = 10.0
    failed_probes: int = 3
    deaths: int = 3
    deaths_window_s: float = 600.0
    stop_grace_s: float = 20.0
    kill_deadline_s: float = 30.0

    def launch(self, rung: Rung) -> Launch:
        return self.ladder.launch(rung)

    def history_key(self, rung: Rung) -> str:
        """The key of a rung's launch in the history, "" where there is none."""
        if self.server is None:
            return ""
        launch = self.launch(rung)
        gpus = [self.uuids.get(gpu, gpu) for gpu in launch.gpus or ()]
        return launch_key(launches.argv(self.server, launch), launch.env, gpus)

    @cached_property
    def allowed(self) -> Mapping[Phase, float]:
        """The patience that holds: the config's, and what was learnt, unless it shall not be (`learn_factor` None)."""
        if self.learn_factor is None:
            return self.patience
        return stall.learnt(self.patience, longest_quiet(self.past), self.learn_factor)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One attempt that is over. `ended_at` and `duration_s` in seconds; `phase` is the last phase reached,
    `incident` the id under which its evidence is kept, "" where it is not."""

    number: int
    rung: Rung
    outcome: str
    phase: str
    ended_at: float
    duration_s: float
    diagnosis: Diagnosis | None
    incident: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What lasts over attempts. `tries` counts attempts since the engine last served or somebody asked for it, `deaths` engines
    in a row that died soon after they had begun to serve. `struggle` counts all attempts since somebody asked for it or it
    served for longer than that: neither another cause nor a short service sets it back. `known` is the rung that served last,
    `forgotten` that somebody wants none to be remembered before the next planned start; while this attempt only tries whether
    the rung above it serves again, `trial` is where to go back to. `out` are the GPUs that must not be used any more, entries of
    CUDA_VISIBLE_DEVICES each with a sentence why: until somebody resets them and starts the daemon anew."""

    attempt: int = 0
    rung: Rung = BASE
    tries: int = 0
    struggle: int = 0
    deaths: int = 0
    ended: tuple[Ended, ...] = ()
    lines_dropped: int = 0
    known: KnownGood | None = None
    forgotten: bool = False
    trial: Rung | None = None
    out: Mapping[str, str] = field(default_factory=dict)

    def asked_anew(self) -> Run:
        """Somebody wants it to run: what failed before does not count against the new attempts."""
        return replace(self, tries=0, struggle=0, deaths=0, trial=None)

    def closed(self, ended: Ended) -> Run:
        return replace(self, ended=(*self.ended, ended)[-LONGEST_HISTORY:])

    def with_incident(self, incident: str) -> Run:
        """The evidence of the attempt that ended last is kept."""
        *before, last = self.ended
        return replace(self, ended=(*before, replace(last, incident=incident)))


@dataclass(frozen=True, kw_only=True)
class Try:
    """After this: another attempt on rung `rung`, `delay_s` later."""

    rung: Rung
    delay_s: float


@dataclass(frozen=True, kw_only=True)
class Anew:
    """After this: a planned start, which begins where the last one served."""


@dataclass(frozen=True, kw_only=True)
class Rest:
    """After this: stay stopped, or end the daemon when `final`."""

    final: bool


@dataclass(frozen=True, kw_only=True)
class Fail:
    """After this: end the daemon with `status` and `message`."""

    status: int
    message: str


Next = Try | Anew | Rest | Fail


@dataclass(frozen=True, kw_only=True)
class Stopped:
    run: Run = field(default_factory=Run)


@dataclass(frozen=True, kw_only=True)
class Checking:
    """The GPUs of the next engine are checked; there is none yet."""

    run: Run
    since: float


@dataclass(frozen=True, kw_only=True)
class Starting:
    """An engine loads. `probing`: a probe is under way, of /health first, then of a completion. `suspicion` is there while
    nothing moves for longer than the patience. `checking`: its GPUs are being checked meanwhile; `checked` is what was found."""

    run: Run
    since: float
    progress: Progress
    clue: Clue = field(default_factory=Clue)
    suspicion: Suspicion | None = None
    checking: bool = False
    checked: Checked | None = None
    pid: int | None = None
    probing: bool = False
    probe_at: float = 0.0
    extended_at: float = 0.0
    warned_unobserved: bool = False


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine serves. `progress` is the load's, kept for the status; `failed_probes` counts those in a row; `errors` are
    the last error lines, each with the time at which it came."""

    run: Run
    since: float
    spawned_at: float
    progress: Progress
    pid: int | None
    errors: tuple[tuple[float, Line], ...] = ()
    failed_probes: int = 0
    probing: bool = False
    probe_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Terminating:
    """A serving engine was asked to end by SIGTERM, until `deadline`."""

    run: Run
    deadline: float
    then: Next
    why: str


@dataclass(frozen=True, kw_only=True)
class Killing:
    """Every process of the attempt is being killed and its GPU memory waited for. `keeping`: first its evidence is kept."""

    run: Run
    since: float
    then: Next
    why: str
    keeping: bool = False


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """The next attempt, on `rung`, waits until `until`."""

    run: Run
    rung: Rung
    until: float


@dataclass(frozen=True, kw_only=True)
class Failed:
    """It is over; the daemon ends with `status`."""

    run: Run
    status: int
    message: str


State = Stopped | Checking | Starting | Ready | Terminating | Killing | Backoff | Failed
