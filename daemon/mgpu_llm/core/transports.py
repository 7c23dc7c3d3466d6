"""How the GPUs of a launch may reach each other: what a preflight is asked about it, and what its answer means for the load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from mgpu_llm.core import cures, diagnosis
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import Ladder, Rung
from mgpu_llm.core.preflight import AS_LAUNCHED, OF_NCCL, Checked, Transport
from mgpu_llm.core.remedies import Area

#: An own rung with variables that begin otherwise only would be tried to no purpose.
TRIED: Final = (*OF_NCCL, "LD_")
#: They are all tried at once, each with a process on every GPU and some hundred megabytes there. No ladder of ours has more.
MOST_ASKED: Final = 3


def ranks(ladder: Ladder, rung: Rung) -> tuple[str, ...]:
    """The GPUs of the rung's ranks; vLLM leaves alone what it sees beyond these. None where there are no GPUs."""
    launch = ladder.launch(rung)
    return (launch.gpus or ())[: launch.tensor_parallel * ladder.pipeline_parallel]


def asked(ladder: Ladder, rung: Rung) -> Mapping[str, Mapping[str, str]]:
    """The transports to ask about, as variables over the launch's own: the launch's, then what the ladder may do instead, from
    gentle to certain. None for a single rank."""
    if len(ranks(ladder, rung)) < 2:
        return {}
    launch = ladder.launch(rung)
    if ladder.own is not None:
        # One may have the name of the launch's own.
        own = (remedy for remedy in ladder.own if remedy not in rung.remedies and remedy.name != AS_LAUNCHED)
        others = tuple(remedy for remedy in own if any(name.startswith(TRIED) for name in remedy.env))[:MOST_ASKED]
    else:
        others = cures.transports(ladder) if Area.TRANSPORTS in ladder.areas else ()
    changing = {other.name: other.env for other in others if not other.env.items() <= launch.env.items()}
    return {AS_LAUNCHED: {}, **changing}


def judge(checked: Checked, gpus: tuple[str, ...]) -> Diagnosis | None:
    """What a load on these GPUs will fail of, None where nothing was found that it would."""
    launched = next(iter(checked.transports), Transport(name=AS_LAUNCHED))
    seen = {other.name: other.works for other in checked.transports[1:] if other.works is not None}
    evidence = tuple(in_words(checked))
    if checked.gpus:
        how = "; ".join(dict.fromkeys(checked.gpus.values()))
        found = diagnosis.of_preflight(f"{_named(checked.gpus)} cannot compute: {how}", evidence)
        return replace(found, gpus=tuple(checked.gpus), transports=seen)
    if launched.works is False:
        who = ", ".join(f"GPUs {one} and {other}" for one, other in checked.pairs) or _named(gpus)
        how = "; ".join(
            [
                transport_in_words(launched),
                *(f"{name} {'works' if works else 'fails too'}" for name, works in seen.items()),
            ]
        )
        return replace(diagnosis.of_preflight(f"{who} do not reach each other: {how}", evidence), transports=seen)
    if checked.pairs:
        how = "; ".join(f"{one} to {other}: {told}" for (one, other), told in checked.pairs.items())
        return diagnosis.of_preflight(f"copies from one GPU to another arrive wrong: GPU {how}", evidence)
    return None


def summary(checked: Checked) -> str:
    """All that was found in one line."""
    if checked.unobserved:
        return f"not known: {checked.unobserved}"
    if checked.gpus or checked.pairs or any(transport.works is False for transport in checked.transports):
        return "; ".join(in_words(checked))
    when = "in an earlier start" if checked.remembered else f"in {checked.took_s:.1f} s"
    speed = next((transport_in_words(transport) for transport in checked.transports), "works")
    return f"passed {when}: {speed}"


def in_words(checked: Checked) -> Iterable[str]:
    """What was found, one sentence each."""
    for gpu, told in checked.gpus.items():
        yield f"GPU {gpu} alone: {told}"
    for (one, other), told in checked.pairs.items():
        yield f"GPU {one} to GPU {other}: {told}"
    for transport in checked.transports:
        yield f"{transport.name}: {transport_in_words(transport)}"


def transport_in_words(transport: Transport) -> str:
    """ "works, 255 GiB/s in all-reduce", or what went wrong."""
    if transport.works is None:
        return transport.detail or "not found out"
    if not transport.works:
        return transport.detail or "fails"
    speed = "" if transport.gib_per_s is None else f", {transport.gib_per_s:.3g} GiB/s in all-reduce"
    return f"works{speed}"


def _named(gpus: Iterable[str]) -> str:
    names = list(gpus)
    return f"GPU {names[0]}" if len(names) == 1 else f"GPUs {', '.join(names)}"
