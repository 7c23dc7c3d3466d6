"""Judge whether a load moves or is stalled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mgpu_llm.core import signals, stacks
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import GpuSample, ProcessSample, Stack
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.suspicion import Finding, Suspicion

#: Seconds in which nothing may move, by phase, until an engine is suspected. The longest quiet of the recorded healthy starts,
#: over all signals, is a few seconds (docs/design.md). Distributed init waits for nothing but its peers; the other phases wait
#: for disks, compilers and kernels too, all of which show in some signal. What a host's own starts need beyond that is learnt.
DEFAULT_PATIENCE_S: Final[Mapping[Phase, float]] = {
    Phase.BOOT: 25.0,
    Phase.DISTRIBUTED_INIT: 8.0,
    Phase.WEIGHTS: 25.0,
    Phase.COMPILE: 25.0,
    Phase.KV_CACHE: 25.0,
    Phase.WARM_UP: 25.0,
    Phase.API: 25.0,
}
#: What one's own starts have taught never makes the patience longer than this: a supervisor that waits longer is none.
LONGEST_LEARNT_S: Final = 600.0
#: Where the stacks cannot tell, quiet alone has to convince, and gets so many times the patience.
UNCONFIRMED_FACTOR: Final = 2.0
#: Stacks that go on changing hold off the verdict for at most so many times the patience: by then, whatever loops there
#: has read nothing, written nothing, needed no memory and said nothing new.
LONGEST_DOUBT_FACTOR: Final = 10.0
LONGEST_DOUBT_S: Final = 1800.0
#: Where nothing but small signals moves for so many times the patience (a monitor that is started again and again, memory that
#: comes and goes), the stacks decide too: a hung engine can have company.
FEEBLE_FACTOR: Final = 10.0
#: Without GPU memory one signal of the heartbeat is missing; what it would have shown may still be happening.
UNOBSERVED_GPU_FACTOR: Final = 3.0
#: An engine that has named the cause of its failure only has to end: vLLM's longest tear-down is about 15 s (0.32.0,
#: a worker killed during the load).
FAILED_PATIENCE_S: Final = 30.0
#: A process spins from this share of a core on, taken over the whole quiet. On a busy host it may not get a whole one.
SPINNING: Final = 0.5
#: And a GPU from this utilisation on.
SPINNING_PERCENT: Final = 95
#: From this share of the last ten seconds on, in which everybody waited for memory, the host thrashes.
THRASHING_PERCENT: Final = 20.0
#: huggingface_hub's words for it, which it repeats for ever.
_WAITS_FOR_LOCK: Final = re.compile(r"waiting to acquire lock on (\S+)")
#: Process states in which the kernel runs nothing of it: stopped by a signal, or by a debugger.
_STOPPED: Final = frozenset("Tt")


@dataclass(frozen=True, kw_only=True)
class Moving:
    """Not stalled. `idle_s` of `patience_s` have passed without movement."""

    idle_s: float
    patience_s: float


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """Nothing has moved for the patience; whether it is stalled is being looked into, until `until_s` of quiet at most.
    `feeble`: small signals did move, and nothing else."""

    idle_s: float
    patience_s: float
    until_s: float
    feeble: bool = False


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """Nothing has moved for `idle_s`, and nobody works. `evidence` says what was seen; the rest is what may explain it:
    whether something spins (None: nobody looked), descriptions of who is stopped, waits for a lock file, waits for
    storage, and of the host's memory, and what the GPUs, the stacks and the last line were."""

    phase: Phase
    idle_s: float
    patience_s: float
    spinning: bool | None
    feeble: bool = False
    evidence: tuple[str, ...] = field(default_factory=tuple)
    stopped: tuple[str, ...] = ()
    lock_waits: tuple[str, ...] = ()
    storage_waits: tuple[str, ...] = ()
    thrashing: str = ""
    gpus: tuple[GpuSample, ...] = ()
    stacks: tuple[Stack, ...] = ()
    last_line: str = ""


Verdict = Moving | Suspect | Stalled


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What else the patience depends on. `has_gpus`: the launch uses GPUs, so that their absence from the samples means that
    something is unobserved. `failed`: the engine has said why it fails, and should end by itself."""

    has_gpus: bool
    failed: bool = False


def judge(
    progress: Progress, patience: Mapping[Phase, float], around: Circumstances, suspicion: Suspicion | None = None
) -> Verdict:
    """Judge by the observed quiet (see `Progress.quiet_s`), never by the wall clock."""
    allowed_s = patience_now(progress, patience, around)
    idle_s = progress.quiet_s - progress.cleared_s
    # What the engine itself has said needs no more than that nobody works.
    until_s = allowed_s if around.failed else allowed_s * UNCONFIRMED_FACTOR
    feeble = idle_s < allowed_s
    if feeble and progress.feeble_s < allowed_s * FEEBLE_FACTOR:
        return Moving(idle_s=idle_s, patience_s=allowed_s)
    finding = suspicion.finding if suspicion is not None else Finding.OPEN
    convinced = finding is Finding.STILL or (finding is Finding.BLIND and idle_s >= until_s)
    longest_s = max(min(allowed_s * LONGEST_DOUBT_FACTOR, LONGEST_DOUBT_S), until_s)
    if not convinced and progress.quiet_s < longest_s:
        shown_s = progress.feeble_s if feeble else idle_s
        return Suspect(idle_s=shown_s, patience_s=allowed_s, until_s=until_s, feeble=feeble)
    seen = suspicion.last.stacks if suspicion is not None and suspicion.last is not None else ()
    return Stalled(
        phase=progress.phase,
        idle_s=progress.feeble_s if feeble else progress.quiet_s,
        patience_s=allowed_s,
        spinning=_spinning(progress),
        feeble=feeble,
        evidence=(*_evidence(progress), *_looked_into(suspicion)),
        stopped=tuple(_named(process.pid, process.name) for process in _stopped(progress)),
        lock_waits=_lock_waits(progress, seen),
        storage_waits=_storage_waits(progress, seen),
        thrashing=_thrashing(progress),
        gpus=() if progress.gpus_unobserved else progress.gpus,
        stacks=seen,
        last_line=progress.last_line,
    )


def patience_now(progress: Progress, patience: Mapping[Phase, float], around: Circumstances) -> float:
    """The patience that holds now. An engine whose log says nothing known has no phase: it gets the longest."""
    allowed_s = patience[progress.phase] if progress.spoke_known_words else max(patience.values())
    if around.has_gpus and progress.gpus_unobserved:
        allowed_s *= UNOBSERVED_GPU_FACTOR
    return min(allowed_s, FAILED_PATIENCE_S) if around.failed else allowed_s


def learnt(floors: Mapping[Phase, float], quiet: Mapping[Phase, float], factor: float) -> dict[Phase, float]:
    """The patience by phase: the config's, or `factor` times the longest quiet that this host's own successful starts have
    had in that phase, if that is longer."""
    return {phase: max(floor, min(factor * quiet.get(phase, 0.0), LONGEST_LEARNT_S)) for phase, floor in floors.items()}


def gpus_spin(progress: Progress) -> bool:
    """Whether every GPU is seen to be fully busy."""
    seen = [gpu.utilisation_percent for gpu in progress.gpus]
    return (
        bool(seen)
        and not progress.gpus_unobserved
        and all(percent is not None and percent >= SPINNING_PERCENT for percent in seen)
    )


def _stopped(progress: Progress) -> list[ProcessSample]:
    return [process for process in progress.processes.values() if process.state in _STOPPED]


def _spinning(progress: Progress) -> bool | None:
    """Whether somebody burns a core or a whole GPU although nothing moves; None when nobody looked."""
    utilisation = [gpu.utilisation_percent for gpu in progress.gpus if gpu.utilisation_percent is not None]
    if not utilisation and not progress.busy:
        return None
    return max(utilisation, default=0) >= SPINNING_PERCENT or max(progress.busy.values(), default=0.0) >= SPINNING


def _lock_waits(progress: Progress, seen: tuple[Stack, ...]) -> tuple[str, ...]:
    if found := stacks.lock_waiters(seen):
        return _described(found)
    said = _WAITS_FOR_LOCK.search(progress.last_line)
    return (f"the engine (it names {said[1]})",) if said else ()


def _storage_waits(progress: Progress, seen: tuple[Stack, ...]) -> tuple[str, ...]:
    """Who waits for storage: by the stacks, or else by the state D that a process had at both ends of the quiet."""
    if found := stacks.storage_waiters(seen):
        return _described(found)
    both = [key for key, process in progress.processes.items() if process.state == "D" and key in progress.resting]
    return tuple(
        _named(pid, progress.processes[pid, started].name)
        for pid, started in both
        if progress.resting[pid, started].state == "D"
    )


def _described(found: tuple[Stack, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_named(stack.pid, stack.process) for stack in found))


def _named(pid: int, name: str) -> str:
    return f"{pid} ({name})"


def _thrashing(progress: Progress) -> str:
    percent = progress.host.memory_percent if progress.host is not None else None
    if percent is None or percent < THRASHING_PERCENT:
        return ""
    return f"all work waited for memory {percent:.0f} % of the last ten seconds"


def _evidence(progress: Progress) -> tuple[str, ...]:
    seen = [f'last line: "{progress.last_line[:160]}"'] if progress.last_line else ["the engine never printed a line"]
    for index, gpu in enumerate(progress.gpus):
        use = "unknown" if gpu.utilisation_percent is None else f"{gpu.utilisation_percent} %"
        power = "" if gpu.power_mw is None else f", {gpu.power_mw / 1000:.0f} W"
        seen.append(f"GPU {index} ({gpu.uuid[:12]}): {gpu.used_bytes / 1e9:.2f} GB used, utilisation {use}{power}")
    if progress.gpus_unobserved:
        seen.append(f"GPUs not observed: {progress.gpus_unobserved}")
    names = {sample.pid: sample.name for sample in progress.processes.values()}
    seen += [
        f"process {pid} ({names.get(pid, '?')}) burns {share:.1f} cores without getting anywhere"
        for pid, share in sorted(progress.busy.items())
        if share >= SPINNING and not signals.is_compiler(names.get(pid, ""))
    ]
    waiting = [_named(sample.pid, sample.name) for sample in progress.processes.values() if sample.state == "D"]
    seen += [f"waiting in the kernel (state D): {', '.join(waiting)}"] if waiting else []
    stopped = [_named(sample.pid, sample.name) for sample in _stopped(progress)]
    return (*seen, *([f"stopped (state T): {', '.join(stopped)}"] if stopped else []))


def _looked_into(suspicion: Suspicion | None) -> tuple[str, ...]:
    if suspicion is None:
        return ()
    shown = stacks.shown(suspicion.last.stacks) if suspicion.last is not None else ()
    blind = f"stacks prove nothing: {suspicion.blind}; so it had twice the patience" if suspicion.blind else ""
    still = "stacks: two looks found every thread in the same place" if suspicion.finding is Finding.STILL else ""
    return tuple(word for word in (still, blind, *shown) if word)
