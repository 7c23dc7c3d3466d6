"""Faults of the GPUs in use, as the kernel and NVML tell them while an engine loads or serves: which end it, which are only told.

An engine whose GPU is gone mostly hangs: it neither exits nor fails a health probe. So what is certain is judged at once, and
what is not only makes us look closer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mgpu_llm.core import diagnosis, xid
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.effects import Announce, Effect, Level
from mgpu_llm.core.events import CompletionProbed, GpuUnfit, KernelSaid
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.xid import Action

#: So many different faults are told of one engine.
MOST_FAULTS: Final = 20
#: The cause, as the table of signatures has it, and how the GPU is called then.
UNFIT: Final[Mapping[Action, tuple[str, str]]] = {
    Action.LOST: ("gpu-lost", "is lost"),
    Action.RESET: ("gpu-needs-reset", "needs a reset"),
    Action.REBOOT: ("gpu-needs-reboot", "needs a reboot of the host"),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of `gpus` (entries of CUDA_VISIBLE_DEVICES). `who` said it in the words `said`; `certain`: it needs no proof."""

    gpus: tuple[str, ...]
    action: Action
    what: str
    who: str
    said: str
    certain: bool

    @property
    def sentence(self) -> str:
        named = f"GPU{'s' if len(self.gpus) > 1 else ''} {', '.join(self.gpus)}"
        return f"{named} {UNFIT[self.action][1]}: {self.what}" if self.action in UNFIT else f"{named}: {self.what}"


def take(
    heart: Progress, event: KernelSaid | GpuUnfit, *, served: bool
) -> tuple[Progress, tuple[Effect, ...]] | Diagnosis:
    """What follows for an engine that loads, or has `served`: its end, or that a fault is told, once."""
    fault = _of_nvml(event) if isinstance(event, GpuUnfit) else _of_kernel(event)
    if fault is None:
        return heart, ()
    if fault.certain and fault.action in UNFIT:
        evidence = (f'{fault.who} said: "{fault.said[:300]}"',)
        return diagnosis.of_unfit_gpus(UNFIT[fault.action][0], fault.sentence, fault.gpus, evidence, served=served)
    if fault.sentence in heart.gpu_faults or len(heart.gpu_faults) >= MOST_FAULTS:
        return heart, ()
    facts = {"attempt": event.attempt, "what": fault.sentence, "advice": xid.ADVICE[fault.action]}
    level = Level.INFO if fault.action is Action.IGNORE else Level.WARNING
    told = Announce(name="gpu.fault", level=level, facts=facts)
    return replace(heart, gpu_faults=(*heart.gpu_faults, fault.sentence)), (told,)


def raises_doubt(event: KernelSaid) -> bool:
    """Whether an engine that serves has to show that it still does: the GPU, or the switch between them, ought to be reset. With
    some of these errors engines are known to go on, and not every driver tells what is to be done."""
    error, switch = xid.read(event.text), xid.of_switch(event.text)
    unfit = error is not None and error.action in UNFIT
    return not event.elsewhere and (unfit or (switch is not None and switch.fatal))


def after_proof(doubted: KernelSaid, event: CompletionProbed) -> Announce | Diagnosis:
    """The engine was asked for a completion because of what the kernel said."""
    if event.served or event.hopeless:  # a server that never answers such requests says nothing of its GPUs
        facts = {"attempt": event.attempt, "after": doubted.text, "why": event.detail}
        return Announce(name="gpu.cleared", facts=facts)
    clue = diagnosis.look_at_kernel(Clue(), doubted.text, doubted.gpus)
    return diagnosis.of_death(f"no completion any more ({event.detail})", clue)


def _of_nvml(event: GpuUnfit) -> Fault:
    return Fault(gpus=(event.gpu,), action=event.action, what=event.what, who="NVML", said=event.what, certain=True)


def _of_kernel(event: KernelSaid) -> Fault | None:
    """None where it is not known to be about a GPU of this engine."""
    error = xid.read(event.text)
    if error is None or not event.gpus:
        return None
    return Fault(
        gpus=event.gpus,
        action=error.action,
        what=f"{error.what} (Xid {error.number})",
        who="the kernel",
        said=event.text.strip(),
        certain=error.certain,
    )
