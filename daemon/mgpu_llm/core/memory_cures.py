"""How much of each GPU's memory vLLM is told to take, and how long a context it is to keep there."""

from __future__ import annotations

from typing import Final

from mgpu_llm.core import remedies
from mgpu_llm.core.case import Case
from mgpu_llm.core.remedies import Area, Remedy, Want

#: Where something else may cure it too, and nothing says how much is free, memory is lowered by so many steps and no further:
#: every step is a whole load.
GUESSED_STEPS: Final = 2
#: What vLLM's own check at the start needs to be left free beside what it was told to take, as a fraction of the GPU.
START_MARGIN: Final = 0.02
#: Context lengths are whole multiples of this, and at least as long.
CONTEXT_UNIT: Final = 256


def lower(case: Case) -> Remedy | str:
    """One step down; where vLLM has said how much is free, as far down as that needs."""
    now, base, ladder = case.launch.utilisation, case.ladder.base.utilisation, case.ladder
    if now is None or base is None:
        return "without GPUs there is none"
    free, total = case.found.figures.get("free"), case.found.figures.get("total")
    most = free / total - START_MARGIN if free and total else 1.0
    values = (round(now - count * ladder.step, 4) for count in range(1, 100))
    value = next((value for value in values if value <= most), 0.0)
    least = max(ladder.floor, base - GUESSED_STEPS * ladder.step if case.guessed and most == 1.0 else 0.0)
    holds = ladder.lowest.get(case.launch.tensor_parallel, 0.0)
    if least <= value < holds:
        return f"weights and cache do not fit at {value:g}"
    if value < round(least, 4) or value <= _failed_below(case):
        return (
            f"what is free would need {max(most, 0.0):.2f}"
            if most < now - ladder.step
            else f"{now:g} is as low as may be"
        )
    return remedies.utilisation(value, raises=False)


def higher(case: Case) -> Remedy | str:
    now, ladder = case.launch.utilisation, case.ladder
    if now is None:
        return "without GPUs there is none"
    value = round(min(now + ladder.step, ladder.ceiling), 4)
    if value <= now:
        return f"{now:g} is as high as may be"
    if value >= _failed_above(case):
        return f"{value:g} was too much"
    return remedies.utilisation(value, raises=True)


def _failed_below(case: Case) -> float:
    """The highest utilisation that was too little for as many GPUs."""
    return max(_seen_utilisation(case, Want.MEMORY_RAISE), default=0.0)


def _failed_above(case: Case) -> float:
    """The lowest utilisation that was too much for as many GPUs, be it for what is free."""
    return min(_seen_utilisation(case, Want.MEMORY_LOWER), default=2.0)


def _seen_utilisation(case: Case, first_want: Want) -> list[float]:
    ranks, seen = case.launch.tensor_parallel, list[float]()
    for failure in case.failures:
        launch = case.ladder.launch(failure.rung)
        wants = [want for want in failure.found.wants if want is not Want.PLAIN_RETRY]
        measured = first_want in wants and "free" in failure.found.figures
        if (
            (wants[:1] == [first_want] or measured)
            and launch.tensor_parallel == ranks
            and launch.utilisation is not None
        ):
            seen.append(launch.utilisation)
    return seen


def shorter_context(case: Case) -> Remedy | str:
    """What the engine says would fit, else half."""
    now = _context_now(case)
    fits = case.found.figures.get("fits")
    if fits is None and now is None:
        return "nobody knows how long it is"
    tokens = ((now or 0) // 2 if fits is None else int(fits)) // CONTEXT_UNIT * CONTEXT_UNIT
    if tokens < CONTEXT_UNIT or (now is not None and tokens >= now):
        return "no shorter one would help"
    return remedies.context(tokens)


def _context_now(case: Case) -> int | None:
    taken = [remedy for remedy in case.rung.remedies if remedy.area is Area.CONTEXT_LENGTH]
    return int(taken[-1].args[-1]) if taken else case.ladder.context
