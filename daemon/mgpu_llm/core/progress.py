"""What has moved, and when: the heartbeat of one load.

Progress is a set of facts that only grow or change when work is done: a phase, shards, captured graphs, progress bars, a
line never printed before, GPU memory, resident memory, bytes read and written, major faults, new processes. Processor time
and GPU utilisation are not among them, because a hung rank spins: they explain a stall and never disprove one. The one
exception is a compiler's processor time: compilers do not wait for peers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mgpu_llm.core import engine_log, signals, weights
from mgpu_llm.core.engine_log import Facts, Phase
from mgpu_llm.core.events import (
    GpuSample,
    GpusSampled,
    GpusUnobserved,
    HostSampled,
    KernelSaid,
    LineRead,
    ProcessesSampled,
    ProcessSample,
)
from mgpu_llm.core.signals import Mark
from mgpu_llm.core.status import Count

#: The longest time one gap between two samples may add to the quiet. A longer gap means that nobody looked (the daemon
#: was stopped, the host suspended): what was not observed is not held against the engine.
LONGEST_LOOK_S: Final = 2.0
#: So many different wordings, and so many different bars, are remembered; an engine that prints more is not loading but
#: flooding.
MOST_WORDINGS: Final = 2000
#: So many births of processes of one name are movement. A load brings its workers up once; what is born again and again
#: is a script that polls. Compilers are born by the hundred, and their work counts by itself.
MOST_BIRTHS: Final = 16
#: Signals that a hung engine's company can move for ever as well: a monitor that is started each minute, a thread that frees
#: and allocates, a line with a new name in it. They hold off a suspicion, but not for ever (core/stall).
SMALL: Final = frozenset({"rss", "read_chars", "log", "processes"})
#: Whom the kernel has killed is known as ours for so long after we last saw it: a look comes each 5 s while serving.
LATELY_S: Final = 15.0
#: So many lines of the kernel are kept.
MOST_SAID: Final = 50
_NUMBER: Final = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The heartbeat's whole memory of one attempt. `moved` maps each signal to when it last moved.

    `quiet_s` is the observed time since anything moved, `longest_quiet` the longest of each phase so far, and `cleared_s`
    that part of the present quiet after which the engine's stacks still showed work. `feeble_s` is the observed time in which
    nothing but SMALL signals moved, `observed_s` all time that was observed. `resting` is the sample with which
    the quiet began, and `busy` maps a pid to the share of one core that it has used since. `phase_began` has the phases
    seen so far. `weights_bytes` is the size of the model's files, None where it is unknown; `weights` what is known of
    their coming, from when they begin to come. `lately` maps the pid of each process of the last LATELY_S to when it was last
    seen, and `kernel` is what the kernel last said of this engine. `gpu_faults` are the faults of its GPUs with which it goes on,
    each told once; `doubted` is a line of the kernel after which it has to show that it still works.
    """

    started_at: float
    weights_bytes: int | None = None
    phase: Phase = Phase.BOOT
    phase_began: Mapping[Phase, float] = field(default_factory=dict)
    shards: Count | None = None
    graphs: Count | None = None
    bars: Mapping[str, int] = field(default_factory=dict)
    weights: weights.Loading | None = None
    serving: bool = False
    moved: Mapping[str, float] = field(default_factory=dict)
    quiet_s: float = 0.0
    cleared_s: float = 0.0
    feeble_s: float = 0.0
    observed_s: float = 0.0
    longest_quiet: Mapping[Phase, float] = field(default_factory=dict)
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
    gpus_held: float = 0.0
    gpus_unobserved: str = ""
    host: HostSampled | None = None
    lately: Mapping[int, float] = field(default_factory=dict)
    kernel: tuple[KernelSaid, ...] = ()
    gpu_faults: tuple[str, ...] = ()
    doubted: KernelSaid | None = None

    @property
    def last_moved_at(self) -> float:
        return max(self.moved.values(), default=self.started_at)

    def spans(self, until: float) -> tuple[tuple[Phase, float, float], ...]:
        """Each phase seen so far with when it began and when it ended, the last one at `until`."""
        began = sorted(self.phase_began.items())
        ends = [*(since for _, since in began[1:]), until]
        return tuple((phase, since, end) for (phase, since), end in zip(began, ends, strict=True))


def begin(at: float, weights_bytes: int | None = None) -> Progress:
    """The heartbeat of an engine spawned at `at`."""
    return Progress(started_at=at, weights_bytes=weights_bytes, phase_began={Phase.BOOT: at})


def after_line(progress: Progress, event: LineRead) -> Progress:
    """Fold in one line: new phases, more shards or graphs, and words never said before are movement; chatter is not."""
    message = engine_log.parse(event.text).message
    if not message.strip():
        return progress
    facts = engine_log.facts(message)
    changed, moved = _after_facts(replace(progress, last_line=message), facts, event.at)
    wording = engine_log.wording(message)
    if wording not in progress.wordings and len(progress.wordings) < MOST_WORDINGS:
        changed = replace(changed, wordings=progress.wordings | {wording})
        if not engine_log.is_chatter(message):
            moved.add("log")
    return _with_movement(changed, event.at, moved)


def _after_facts(progress: Progress, facts: Facts, at: float) -> tuple[Progress, set[str]]:
    changed, moved = progress, set[str]()
    if facts.phase is not None:
        changed = replace(changed, spoke_known_words=True)
        if facts.phase > progress.phase:
            changed, moved = _in_phase(changed, facts.phase, at), {"phase"}
    changed = replace(changed, shards=facts.shards or changed.shards, graphs=facts.graphs or changed.graphs)
    if facts.serving and not progress.serving:
        changed, moved = replace(changed, serving=True), moved | {"serving"}
    if facts.bar is not None:
        what, done = facts.bar
        # Only what goes beyond the furthest yet is work: a bar that starts over and over is a loop.
        if done > progress.bars.get(what, -1) and (what in progress.bars or len(progress.bars) < MOST_WORDINGS):
            changed, moved = replace(changed, bars={**progress.bars, what: done}), moved | {"bar"}
    return changed, moved


def _in_phase(progress: Progress, phase: Phase, at: float) -> Progress:
    changed = replace(progress, phase=phase, phase_began={**progress.phase_began, phase: at})
    if phase is Phase.WEIGHTS and progress.weights_bytes:
        return replace(changed, weights=weights.begin(progress.totals, progress.gpus_held))
    return changed


def after_processes(progress: Progress, event: ProcessesSampled) -> Progress:
    """Fold in one sample of the tree. This is what makes quiet grow: it is observed time, from one sample to the next."""
    now = {(sample.pid, sample.started): sample for sample in event.processes}
    before = progress.processes
    pairs = [(before[key], sample) for key, sample in now.items() if key in before]
    totals = signals.process_totals(progress.totals, pairs)
    # The most memory yet: what comes and goes does not exceed it, what is loaded does.
    totals["rss_high"] = max(totals["rss_high"], float(sum(sample.rss_bytes for sample in event.processes)))
    moved, marks = signals.measured(progress.marks, totals, event.at)
    births = dict(progress.births)
    for name, count in Counter(_kind(sample.name) for key, sample in now.items() if key not in before).items():
        if births.get(name, 0) < MOST_BIRTHS and (name in births or len(births) < MOST_WORDINGS):
            moved.add("processes")
            births[name] = births.get(name, 0) + count
    # What moved between two samples (a line, a GPU's memory) begins the quiet at its own time, not at the sample before it.
    looked_since = None if progress.sampled_at is None else max(progress.sampled_at, progress.last_moved_at)
    elapsed_s = event.at - looked_since if looked_since is not None else 0.0
    begins = progress.quiet_s == 0.0
    resting = before if begins else progress.resting
    resting_at = progress.sampled_at if begins and progress.sampled_at is not None else progress.resting_at
    quiet_s = progress.quiet_s + min(max(elapsed_s, 0.0), LONGEST_LOOK_S)
    since_s = event.at - progress.sampled_at if progress.sampled_at is not None else 0.0
    seen_s = min(max(since_s, 0.0), LONGEST_LOOK_S)
    changed = replace(
        progress,
        processes=now,
        lately=_lately(progress.lately, event),
        births=births,
        resting=resting,
        resting_at=resting_at,
        busy=_shares(resting, now, event.at - resting_at),
        totals=totals,
        marks=marks,
        sampled_at=event.at,
        quiet_s=quiet_s,
        feeble_s=progress.feeble_s + seen_s,
        observed_s=progress.observed_s + seen_s,
    )
    # A quiet that looks at the stacks have cleared needs no patience, and teaches none.
    if not moved and not progress.cleared_s and quiet_s > progress.longest_quiet.get(progress.phase, 0.0):
        changed = replace(changed, longest_quiet={**progress.longest_quiet, progress.phase: quiet_s})
    return _with_movement(_with_weights(changed, event.at), event.at, moved)


def after_gpus(progress: Progress, event: GpusSampled) -> Progress:
    """Fold in what the GPUs hold: memory that grows or shrinks on any of them is movement."""
    held = signals.gpu_memory(event.gpus, frozenset(pid for pid, _ in progress.processes))
    moved, marks = signals.measured(progress.marks, held, event.at)
    changed = replace(progress, gpus=event.gpus, gpus_held=sum(held.values()), gpus_unobserved="", marks=marks)
    return _with_movement(changed, event.at, {"gpu_memory"} if moved else set())


def after_gpus_unobserved(progress: Progress, event: GpusUnobserved) -> Progress:
    """The GPUs cannot be seen: rules that need them abstain from now on."""
    return replace(progress, gpus_unobserved=event.reason)


def after_host(progress: Progress, event: HostSampled) -> Progress:
    """Keep how the host fares: it explains a stall."""
    return replace(progress, host=event)


def after_kernel(progress: Progress, event: KernelSaid) -> Progress:
    """Keep what the kernel said: it explains an end."""
    return replace(progress, kernel=(*progress.kernel, event)[-MOST_SAID:])


def after_work_seen(progress: Progress, at: float) -> Progress:
    """Although no signal moves, the engine's stacks do: somebody works, and the quiet so far counts for nothing."""
    return replace(progress, cleared_s=progress.quiet_s, feeble_s=0.0, moved={**progress.moved, "stacks": at})


def _lately(before: Mapping[int, float], event: ProcessesSampled) -> dict[int, float]:
    now = dict.fromkeys((process.pid for process in event.processes), event.at)
    return {**{pid: at for pid, at in before.items() if event.at - at <= LATELY_S}, **now}


def _with_weights(progress: Progress, at: float) -> Progress:
    if progress.weights is None or progress.weights_bytes is None or progress.phase is not Phase.WEIGHTS:
        return progress
    coming = weights.after_sample(
        progress.weights, progress.totals, progress.gpus_held, progress.shards, progress.weights_bytes, at
    )
    return replace(progress, weights=coming)


def _shares(
    before: Mapping[tuple[int, int], ProcessSample], now: Mapping[tuple[int, int], ProcessSample], elapsed_s: float
) -> dict[int, float]:
    if elapsed_s <= 0:
        return {}
    return {key[0]: (sample.cpu_s - before[key].cpu_s) / elapsed_s for key, sample in now.items() if key in before}


def _with_movement(progress: Progress, at: float, moved: set[str]) -> Progress:
    if not moved:
        return progress
    changed = replace(progress, moved={**progress.moved, **dict.fromkeys(moved, at)}, quiet_s=0.0, cleared_s=0.0)
    return changed if moved <= SMALL else replace(changed, feeble_s=0.0)


def _kind(name: str) -> str:
    """A process's name without its number: "helper-17" is one more of a kind."""
    return _NUMBER.sub("#", name)
