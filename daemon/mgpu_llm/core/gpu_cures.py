"""Which GPUs a launch has: fewer, or others than those that have failed."""

from __future__ import annotations

from itertools import combinations, islice
from typing import Final

from mgpu_llm.core import remedies
from mgpu_llm.core.case import Case
from mgpu_llm.core.remedies import Remedy, Want

#: So many sets of GPUs are looked at: more than attempts will ever be made.
MOST_SETS: Final = 1000
NONE_FEWER: Final = "there are none fewer"


def fewer(case: Case) -> Remedy | str:
    sizes = [size for size in case.ladder.sizes if size < case.launch.tensor_parallel]
    if not sizes:
        return case.ladder.no_sizes or NONE_FEWER
    if case.launch.gpus is None:
        return remedies.gpus(None, sizes[0], case.ladder.base)
    for size in sizes:
        if (gpus := _others(case, size)) is not None:
            return remedies.gpus(gpus, size, case.ladder.base)
    return "the others have failed too"


def other(case: Case) -> Remedy | str:
    """As many GPUs without the one that failed."""
    gpus = _others(case, len(case.launch.gpus or ()))
    if not gpus:
        return "gpus.spares names none that is left"
    return remedies.gpus(gpus, case.launch.tensor_parallel, case.ladder.base)


def _others(case: Case, size: int) -> tuple[str, ...] | None:
    """So many GPUs without those that have failed; the base's first, but for those that were among them when one failed that
    nobody could name. A smaller set that failed so is given up as a whole: else every combination would be loaded in turn."""
    base = case.ladder.base.gpus or ()
    now = case.launch.gpus or ()
    # What a spare stands in for has failed before, perhaps in another life; and the base's own are no change.
    bad = set(base) - set(now) if len(now) == len(base) else set[str]()
    sets, doubtful = [set(base)], set[str]()
    for failure in case.failures:
        bad.update(failure.found.gpus)
        if Want.OTHER_GPU not in failure.found.wants or failure.found.gpus:
            continue
        gpus, rank = case.ladder.launch(failure.rung).gpus or (), failure.found.rank
        sets.append(set(gpus))
        if rank is not None and 0 <= rank < len(gpus):
            bad.add(gpus[rank])
        elif len(gpus) == 1 or len(gpus) < len(base):
            bad.update(gpus)
        else:
            doubtful.update(gpus)
    pool = [gpu for gpu in (*base, *case.ladder.spares) if gpu not in bad]
    sound_first = sorted(pool, key=lambda gpu: gpu in doubtful)
    found = (chosen for chosen in islice(combinations(sound_first, size), MOST_SETS) if set(chosen) not in sets)
    chosen = next((set(chosen) for chosen in found), None)
    return None if chosen is None else tuple(gpu for gpu in pool if gpu in chosen)
