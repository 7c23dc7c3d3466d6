"""What has moved, and when: the heartbeat of one load.

Progress is a set of facts that only grow or change when work is done: a phase, shards, captured graphs, a line never
printed before, GPU memory, resident memory, bytes read, major faults, new processes. Processor time and GPU utilisation
are not among them, because a hung rank spins: they explain a stall and never disprove one. The one exception is a
compiler's processor time: compilers do not wait for peers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mgpu_llm.core import engine_log
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpuSample, GpusSampled, GpusUnobserved, LineRead, ProcessesSampled, ProcessSample
from mgpu_llm.core.status import Count

MIB: Final = 1 << 20

#: What each measured signal must change by, within WINDOW_S, to count as movement. An idle Python process moves less:
#: docs/design.md has the measurement on a hung vLLM.
NOISE_FLOOR: Final[Mapping[str, float]] = {
    "gpu_memory": 1 * MIB,
    "rss": 1 * MIB,
    "read_chars": 64 << 10,
    "read_bytes": 64 << 10,
    "major_faults": 8,
    "compilers": 0.5,
}
WINDOW_S: Final = 5.0
#: The longest time one gap between two samples may add to the quiet. A longer gap means that nobody looked (the daemon
#: was stopped, the host suspended): what was not observed is not held against the engine.
LONGEST_LOOK_S: Final = 2.0
#: So many different wordings are remembered; an engine that prints more is not loading but flooding.
MOST_WORDINGS: Final = 2000
#: So many births of processes of one name are movement. A load brings its workers up once; what is born again and again
#: is a script that polls. Compilers are born by the hundred, and their work counts by itself.
MOST_BIRTHS: Final = 16
COMPILERS: Final = frozenset(
    {
        "nvcc",
        "cicc",
        "ptxas",
        "ninja",
        "cc1plus",
        "cc1",
        "g++",
        "gcc",
        "c++",
        "clang",
        "clang++",
        "ld",
        "as",
        "cudafe++",
    }
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A signal's value when it last moved, or when its window began anew."""

    at: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The heartbeat's whole memory of one attempt. `moved` maps each signal to when it last moved.

    `quiet_s` is the observed time since anything moved. `resting` is the sample with which that quiet began, and `busy`
    maps a pid to the share of one core that it has used since.
    """

    started_at: float
    phase: Phase = Phase.BOOT
    shards: Count | None = None
    graphs: Count | None = None
    serving: bool = False
    moved: Mapping[str, float] = field(default_factory=dict)
    quiet_s: float = 0.0
    last_line: str = ""
    spoke_known_words: bool = False
    wordings: frozenset[str] = frozenset()
    marks: Mapping[str, Mark] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    processes: Mapping[tuple[int, int], ProcessSample] = field(default_factory=dict)
    births: Mapping[str, int] = field(default_factory=dict)
    resting: Mapping[tuple[int, int], ProcessSample] = field(default_factory=dict)
    resting_at: float = 0.0
    busy: Mapping[int, float] = field(default_factory=dict)
    sampled_at: float | None = None
    gpus: tuple[GpuSample, ...] = ()
    gpus_unobserved: str = ""

    @property
    def last_moved_at(self) -> float:
        return max(self.moved.values(), default=self.started_at)


def begin(at: float) -> Progress:
    """The heartbeat of an engine spawned at `at`."""
    return Progress(started_at=at)


def after_line(progress: Progress, event: LineRead) -> Progress:
    """Fold in one line: new phases, more shards or graphs, and words never said before are movement; chatter is not."""
    message = engine_log.parse(event.text).message
    if not message.strip():
        return progress
    facts, moved = engine_log.facts(message), set[str]()
    changed = replace(progress, last_line=message)
    if facts.phase is not None:
        changed = replace(changed, spoke_known_words=True)
        if facts.phase > progress.phase:
            changed, moved = replace(changed, phase=facts.phase), {"phase"}
    if facts.shards is not None and facts.shards != progress.shards:
        changed, moved = replace(changed, shards=facts.shards), moved | {"shards"}
    if facts.graphs is not None and facts.graphs != progress.graphs:
        changed, moved = replace(changed, graphs=facts.graphs), moved | {"graphs"}
    if facts.serving and not progress.serving:
        changed, moved = replace(changed, serving=True), moved | {"serving"}
    wording = engine_log.wording(message)
    if wording not in progress.wordings and len(progress.wordings) < MOST_WORDINGS:
        changed = replace(changed, wordings=progress.wordings | {wording})
        if not engine_log.is_chatter(message):
            moved.add("log")
    return _with_movement(changed, event.at, moved)


def after_processes(progress: Progress, event: ProcessesSampled) -> Progress:
    """Fold in one sample of the tree. Counters are summed over processes by what each one added since the last sample,
    so that a process that ends takes nothing away."""
    now = {(sample.pid, sample.started): sample for sample in event.processes}
    before = progress.processes
    born = now.keys() - before.keys()
    pairs = [(before[key], sample) for key, sample in now.items() if key in before]
    totals = {
        # Memory may shrink while work is done, so each process's changes count both ways; what comes and goes with a
        # process is not its work.
        "rss": progress.totals.get("rss", 0.0) + sum(abs(b.rss_bytes - a.rss_bytes) for a, b in pairs),
        "read_chars": _grown(progress, "read_chars", ((a.read_chars, b.read_chars) for a, b in pairs)),
        "read_bytes": _grown(progress, "read_bytes", ((a.read_bytes, b.read_bytes) for a, b in pairs)),
        "major_faults": _grown(progress, "major_faults", ((a.major_faults, b.major_faults) for a, b in pairs)),
        "compilers": _grown(
            progress, "compilers", ((a.cpu_s, b.cpu_s) for a, b in pairs if b.name.lower() in COMPILERS)
        ),
    }
    elapsed_s = event.at - progress.sampled_at if progress.sampled_at is not None else 0.0
    moved_since = progress.quiet_s == 0.0
    resting = before if moved_since else progress.resting
    resting_at = progress.sampled_at if moved_since and progress.sampled_at is not None else progress.resting_at
    moved, marks = _measured(progress.marks, totals, event.at)
    births = Counter(progress.births)
    for name in (now[key].name for key in born):
        births[name] += 1
        if births[name] <= MOST_BIRTHS:
            moved = moved | {"processes"}
    quiet_s = progress.quiet_s + min(max(elapsed_s, 0.0), LONGEST_LOOK_S)
    changed = replace(
        progress,
        processes=now,
        births=births,
        resting=resting,
        resting_at=resting_at,
        busy=_shares(resting, now, event.at - resting_at),
        totals=totals,
        marks=marks,
        sampled_at=event.at,
        quiet_s=quiet_s,
    )
    return _with_movement(changed, event.at, moved)


def after_gpus(progress: Progress, event: GpusSampled) -> Progress:
    """Fold in what the GPUs hold: memory that grows or shrinks on any of them is movement."""
    used = {f"gpu_memory {gpu.uuid}": float(gpu.used_bytes) for gpu in event.gpus}
    moved, marks = _measured(progress.marks, used, event.at)
    changed = replace(progress, gpus=event.gpus, gpus_unobserved="", marks=marks)
    return _with_movement(changed, event.at, {"gpu_memory"} if moved else set())


def after_gpus_unobserved(progress: Progress, event: GpusUnobserved) -> Progress:
    """The GPUs cannot be seen: rules that need them abstain from now on."""
    return replace(progress, gpus_unobserved=event.reason)


def _measured(marks: Mapping[str, Mark], values: Mapping[str, float], at: float) -> tuple[set[str], Mapping[str, Mark]]:
    """Compare each value with its mark. What changed by its floor within the window has moved and gets a new mark;
    a window that passed without gets one too, so that a slow drip below the floor never adds up to movement."""
    moved, fresh = set[str](), dict(marks)
    for signal, value in values.items():
        mark = marks.get(signal)
        if mark is None:
            fresh[signal] = Mark(at=at, value=value)
        elif abs(value - mark.value) >= NOISE_FLOOR[signal.split(" ", 1)[0]]:
            moved.add(signal)
            fresh[signal] = Mark(at=at, value=value)
        elif at - mark.at > WINDOW_S:
            fresh[signal] = Mark(at=at, value=value)
    return moved, fresh


def _grown(progress: Progress, signal: str, pairs: Iterable[tuple[float | None, float | None]]) -> float:
    total = progress.totals.get(signal, 0.0)
    for before, now in pairs:
        if before is not None and now is not None and now > before:
            total += now - before
    return total


def _shares(
    before: Mapping[tuple[int, int], ProcessSample], now: Mapping[tuple[int, int], ProcessSample], elapsed_s: float
) -> dict[int, float]:
    if elapsed_s <= 0:
        return {}
    return {key[0]: (sample.cpu_s - before[key].cpu_s) / elapsed_s for key, sample in now.items() if key in before}


def _with_movement(progress: Progress, at: float, moved: set[str]) -> Progress:
    if not moved:
        return progress
    return replace(progress, moved={**progress.moved, **dict.fromkeys(moved, at)}, quiet_s=0.0)
