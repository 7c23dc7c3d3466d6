"""Which two of many GPUs do not get through to each other: NCCL on pairs that share no GPU, a round of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mgpu_llm.adapters.preflight.trial import Trial

if TYPE_CHECKING:
    from mgpu_llm.adapters.preflight.examination import Examination


async def pairs(examination: Examination, took_s: float) -> dict[tuple[str, str], str]:
    """By pair, as launched, what is wrong with it; those for which there was no time are left out. `took_s` is what an
    all-reduce over all GPUs needs by a transport that works."""
    found: dict[tuple[str, str], str] = {}
    patience, began = examination.patience, examination.now

    def over() -> bool:
        return examination.now - began >= patience.pairs_s

    for number, games in enumerate(tournament(len(examination.entries))):
        if over():
            break
        trials = [examination.start(f"pair {number}: {one}, {two}", (one, two)) for one, two in games]
        await examination.learn(partial(_either, over, partial(_judged, examination, trials, took_s)))
        for trial in trials:
            one, two = (examination.entries[device] for device in trial.devices)
            if trial.failed(examination.now) and trial.broken():
                found[one, two] = trial.why()
            elif _late(examination, trial, took_s):
                found[one, two] = "an all-reduce of the two does not come back"
        await examination.buried(trials)
    return found


def _either(one: Callable[[], bool], other: Callable[[], bool]) -> bool:
    return one() or other()


def _judged(examination: Examination, trials: Sequence[Trial], took_s: float) -> bool:
    return all(trial.settled(examination.now) or _late(examination, trial, took_s) for trial in trials)


def _late(examination: Examination, trial: Trial, took_s: float) -> bool:
    patience = examination.patience
    return trial.waits() and examination.overdue(trial, took_s, patience.other_floor_s, patience.times)


def tournament(players: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which each of 0 to `players` - 1 meets one other at most, until each has met each."""
    seats: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        across = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(one, two), max(one, two)) for one, two in across if one is not None and two is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]
