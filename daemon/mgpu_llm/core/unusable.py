"""GPUs that must not be used any more in this life of the daemon: every attempt is led around them, or there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from mgpu_llm.core import cures, decision
from mgpu_llm.core.case import Failure
from mgpu_llm.core.cures import Choice
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Announce, Level
from mgpu_llm.core.ladder import Rung
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.states import Fail, Policy, Run

CAUSE: Final = "gpu-unusable"
ADVICE: Final = "reset the GPUs (nvidia-smi --gpu-reset) or reboot the host, then restart this service with systemctl"
WANTS: Final = (Want.OTHER_GPU, Want.FEWER_GPUS, Want.STOP)


def noted(run: Run, dirty: Mapping[str, str]) -> tuple[Run, tuple[Announce, ...]]:
    """The run without these GPUs, entries of CUDA_VISIBLE_DEVICES each with a sentence why; each is told once."""
    new = {gpu: why for gpu, why in dirty.items() if gpu not in run.out}
    told = tuple(
        Announce(name="gpu.out", level=Level.ERROR, facts={"gpu": gpu, "why": why, "advice": ADVICE})
        for gpu, why in new.items()
    )
    return replace(run, out={**run.out, **new}), told


def diagnosis(out: Mapping[str, str]) -> Diagnosis:
    return Diagnosis(
        cause=CAUSE,
        outcome="crashed",
        summary="; ".join(f"GPU {gpu} must not be used any more: {why}" for gpu, why in out.items()),
        advice=ADVICE,
        wants=WANTS,
        gpus=tuple(out),
    )


def around(run: Run, rung: Rung, policy: Policy) -> Rung | Fail:
    """The rung itself where it uses none of the GPUs that are out, else with others or fewer; Fail where these do not suffice."""
    used = policy.launch(rung).gpus or ()
    out = {gpu: why for gpu, why in run.out.items() if gpu in used}
    if not out:
        return rung
    last = Failure(rung=rung, found=diagnosis(run.out))
    choice = Choice()
    # Those that have failed otherwise are passed over too, unless there is nothing else.
    for failures in ((*decision.failures_since_it_served(run), last), (last,)):
        choice = cures.choose(policy.ladder, failures, again=False)
        if choice.remedy is not None:
            return rung.plus(choice.remedy)
    why = "; ".join(f"{option.what}: {option.why}" for option in choice.outs) or "the admin's own rungs name no others"
    found = diagnosis(out)
    return Fail(
        status=decision.GAVE_UP,
        message=f"gave up: {found.summary}; no other GPUs suffice ({why}). What to do: {found.advice}",
    )


def in_words(run: Run) -> tuple[str, ...]:
    """A sentence for each, for the status."""
    return tuple(f"GPU {gpu} is out: {why}; {ADVICE}" for gpu, why in run.out.items())
