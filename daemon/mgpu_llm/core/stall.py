"""Judge whether a load moves or is stalled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.progress import COMPILERS, Progress

#: Seconds in which nothing may move, by phase. The longest quiet of five healthy recorded starts, over all signals, was
#: 1.8 s (boot, beside an empty compile cache on two H200s). Distributed init waits for nothing but its peers, so it gets
#: little more than the noise of a loaded host; phases that wait for disks, compilers and kernels get what these may take.
DEFAULT_PATIENCE_S: Final[Mapping[Phase, float]] = {
    Phase.BOOT: 60.0,
    Phase.DISTRIBUTED_INIT: 15.0,
    Phase.WEIGHTS: 90.0,
    Phase.COMPILE: 300.0,
    Phase.KV_CACHE: 120.0,
    Phase.WARM_UP: 180.0,
    Phase.API: 120.0,
}
#: Without GPU memory one signal of the heartbeat is missing; what it would have shown may still be happening.
UNOBSERVED_GPU_FACTOR: Final = 3.0
#: An engine that has named the cause of its failure only has to end: vLLM's longest tear-down is about 15 s (0.32.0,
#: a worker killed during the load).
FAILED_PATIENCE_S: Final = 30.0
#: A process spins from this share of a core on, taken over the whole quiet. On a busy host it may not get a whole one.
SPINNING: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Moving:
    """Not stalled. `idle_s` of `patience_s` have passed without movement."""

    idle_s: float
    patience_s: float


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """Nothing has moved for `idle_s`, which is more than the phase's patience. `evidence` says what was seen."""

    phase: Phase
    idle_s: float
    patience_s: float
    spinning: bool | None
    evidence: tuple[str, ...] = field(default_factory=tuple)


Verdict = Moving | Stalled


def judge(progress: Progress, patience: Mapping[Phase, float], *, has_gpus: bool, failed: bool = False) -> Verdict:
    """Judge by the observed quiet (see `Progress.quiet_s`), never by the wall clock.

    `has_gpus`: the launch uses GPUs, so that their absence from the samples means something is unobserved.
    `failed`: the engine has said why it fails, and should end by itself.
    """
    allowed_s = patience_now(progress, patience, has_gpus=has_gpus, failed=failed)
    if progress.quiet_s < allowed_s:
        return Moving(idle_s=progress.quiet_s, patience_s=allowed_s)
    return Stalled(
        phase=progress.phase,
        idle_s=progress.quiet_s,
        patience_s=allowed_s,
        spinning=_spinning(progress),
        evidence=_evidence(progress),
    )


def patience_now(progress: Progress, patience: Mapping[Phase, float], *, has_gpus: bool, failed: bool = False) -> float:
    """The patience that holds now. An engine whose log says nothing known has no phase: it gets the longest."""
    allowed_s = patience[progress.phase] if progress.spoke_known_words else max(patience.values())
    if has_gpus and progress.gpus_unobserved:
        allowed_s *= UNOBSERVED_GPU_FACTOR
    return min(allowed_s, FAILED_PATIENCE_S) if failed else allowed_s


def _spinning(progress: Progress) -> bool | None:
    """Whether somebody burns a core or a whole GPU although nothing moves; None when nobody looked."""
    utilisation = [gpu.utilisation_percent for gpu in progress.gpus if gpu.utilisation_percent is not None]
    if not utilisation and not progress.busy:
        return None
    return max(utilisation, default=0) >= 95 or max(progress.busy.values(), default=0.0) >= SPINNING


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
        if share >= SPINNING and names.get(pid, "") not in COMPILERS
    ]
    waiting = [f"{sample.pid} ({sample.name})" for sample in progress.processes.values() if sample.state == "D"]
    return (*seen, *([f"waiting in the kernel (state D): {', '.join(waiting)}"] if waiting else []))
