"""Which remedy comes next, from what failed and why: what a cause wants, held against what there is and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from typing import Final

from mgpu_llm.core import remedies
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import Ladder, Nvlink, Rung
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import SEEN_BY_CLIENTS, Area, Remedy, Want

#: Where something else may cure it too, and nothing says how much is free, memory is lowered by so many steps and no further:
#: every step is a whole load.
GUESSED_STEPS: Final = 2
#: What vLLM's own check at the start needs to be left free beside what it was told to take, as a fraction of the GPU.
START_MARGIN: Final = 0.02
#: Context lengths are whole multiples of this, and at least as long.
CONTEXT_UNIT: Final = 256
#: So many sets of GPUs are looked at: more than attempts will ever be made.
MOST_SETS: Final = 1000
SO_ALREADY: Final = "it is so already"
ONE_RANK: Final = "there is one rank only"
NONE_FEWER: Final = "there are none fewer"
#: From gentle to certain.
TRANSPORT_STEPS: Final[Mapping[Nvlink, tuple[Remedy, ...]]] = {
    Nvlink.ALL: (remedies.NVLINK_GENTLE, remedies.P2P_OFF),
    Nvlink.SOME: (remedies.P2P_NVLINK_ONLY, remedies.P2P_OFF),
    Nvlink.NONE: (remedies.P2P_OFF,),
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt that failed: on which rung, and why."""

    rung: Rung
    found: Diagnosis


@dataclass(frozen=True, kw_only=True)
class Out:
    """What a cause wants and cannot have. `forbidden`: only because the admin has not allowed it."""

    what: str
    why: str
    forbidden: bool = False

    @property
    def moot(self) -> bool:
        """Whether it would change nothing."""
        return self.why in (SO_ALREADY, ONE_RANK, NONE_FEWER)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to try next: the same again (`retry`), one more remedy, or, with neither, nothing. `outs` is what was wanted before
    that and could not be had."""

    remedy: Remedy | None = None
    retry: bool = False
    outs: tuple[Out, ...] = ()


def choose(ladder: Ladder, failures: Sequence[Failure], *, again: bool = True) -> Choice:
    """The next thing to try after the last of `failures`, which are those in a row, oldest first. The same again only while
    `again`."""
    rung, found = failures[-1].rung, failures[-1].found
    # Once the same again has not helped, it is not asked of every other rung too: each is a whole load.
    retried = sum(one.found.cause == found.cause and one.rung == next_.rung for one, next_ in pairwise(failures))
    outs = list[Out]()
    for want in found.wants:
        if want is Want.STOP:
            break
        if want is Want.PLAIN_RETRY:
            if again and retried <= 0:
                return Choice(retry=True, outs=tuple(outs))
            retried -= 1
        elif ladder.own is None:
            answer = find(want, ladder, failures)
            if isinstance(answer, Remedy):
                return Choice(remedy=answer, outs=tuple(outs))
            outs.append(answer)
    # Where GPUs are gone, the stop is for the same ones alone.
    if ladder.own is not None and (found.gpus or Want.STOP not in found.wants):
        left = [own for own in ladder.own if own not in rung.remedies]
        fit = [own for own in left if set(found.gpus).isdisjoint(ladder.launch(rung.plus(own)).gpus or ())]
        return Choice(remedy=fit[0] if fit else None)
    return Choice(outs=tuple(outs))


def transports(ladder: Ladder) -> tuple[Remedy, ...]:
    """Other ways for these GPUs to talk to each other, from gentle to certain. The last is so slow that it is taken only where it
    was seen to be the one that works."""
    return (*TRANSPORT_STEPS[ladder.nvlink], remedies.SOCKETS)


def find(want: Want, ladder: Ladder, failures: Sequence[Failure]) -> Remedy | Out:
    """The remedy that gives what is wanted, or why there is none."""
    finder, area, what = _FINDERS[want]
    if area not in ladder.areas:
        seen = f'clients would see it, and ladder.may_change does not name "{area}"'
        return Out(what=what, why=seen if area in SEEN_BY_CLIENTS else f'ladder.pin names "{area}"', forbidden=True)
    answer = finder(_Case(want=want, ladder=ladder, failures=failures))
    return Out(what=what, why=answer) if isinstance(answer, str) else answer


@dataclass(frozen=True, kw_only=True)
class _Case:
    want: Want
    ladder: Ladder
    failures: Sequence[Failure]

    @property
    def rung(self) -> Rung:
        return self.failures[-1].rung

    @property
    def found(self) -> Diagnosis:
        return self.failures[-1].found

    @property
    def launch(self) -> Launch:
        return self.ladder.launch(self.rung)

    @property
    def guessed(self) -> bool:
        """Whether something else is left to be tried after it."""
        return self.found.wants[-1] is not self.want


def _first_new(case: _Case, *steps: Remedy) -> Remedy | str:
    """The first that would change anything."""
    launch = case.launch
    if launch.tensor_parallel * case.ladder.pipeline_parallel == 1:
        return ONE_RANK
    return next((step for step in steps if step.over(launch) != launch), SO_ALREADY)


def _only(remedy: Remedy) -> Callable[[_Case], Remedy | str]:
    """For what one remedy gives."""
    return lambda case: _first_new(case, remedy)


def _transport(case: _Case) -> Remedy | str:
    """The first that a preflight has seen to work, else the first of which it did not see that it fails."""
    seen = {name: works for failure in case.failures for name, works in failure.found.transports.items()}
    steps = [step for step in transports(case.ladder) if seen.get(step.name, step is not remedies.SOCKETS)]
    if not steps:
        return "none of them works"
    return _first_new(case, *sorted(steps, key=lambda step: step.name not in seen))


def _network_interface(case: _Case) -> Remedy | str:
    if not case.ladder.one_host:
        return "other hosts take part, and cannot be reached through the loopback interface"
    return _first_new(case, remedies.LOOPBACK)


def _eager(case: _Case) -> Remedy | str:
    return remedies.EAGER if remedies.EAGER.over(case.launch) != case.launch else SO_ALREADY


def _dtype(case: _Case) -> Remedy | str:
    return remedies.FLOAT16 if remedies.FLOAT16.over(case.launch) != case.launch else SO_ALREADY


def _memory_lower(case: _Case) -> Remedy | str:
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


def _memory_raise(case: _Case) -> Remedy | str:
    now, ladder = case.launch.utilisation, case.ladder
    if now is None:
        return "without GPUs there is none"
    value = round(min(now + ladder.step, ladder.ceiling), 4)
    if value <= now:
        return f"{now:g} is as high as may be"
    if value >= _failed_above(case):
        return f"{value:g} was too much"
    return remedies.utilisation(value, raises=True)


def _failed_below(case: _Case) -> float:
    """The highest utilisation that was too little for as many GPUs."""
    return max(_seen_utilisation(case, Want.MEMORY_RAISE), default=0.0)


def _failed_above(case: _Case) -> float:
    """The lowest utilisation that was too much for as many GPUs, be it for what is free."""
    return min(_seen_utilisation(case, Want.MEMORY_LOWER), default=2.0)


def _seen_utilisation(case: _Case, first_want: Want) -> list[float]:
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


def _context_length(case: _Case) -> Remedy | str:
    """What the engine says would fit, else half."""
    now = _context_now(case)
    fits = case.found.figures.get("fits")
    if fits is None and now is None:
        return "nobody knows how long it is"
    tokens = ((now or 0) // 2 if fits is None else int(fits)) // CONTEXT_UNIT * CONTEXT_UNIT
    if tokens < CONTEXT_UNIT or (now is not None and tokens >= now):
        return "no shorter one would help"
    return remedies.context(tokens)


def _context_now(case: _Case) -> int | None:
    taken = [remedy for remedy in case.rung.remedies if remedy.area is Area.CONTEXT_LENGTH]
    return int(taken[-1].args[-1]) if taken else case.ladder.context


def _fewer_gpus(case: _Case) -> Remedy | str:
    sizes = [size for size in case.ladder.sizes if size < case.launch.tensor_parallel]
    if not sizes:
        return case.ladder.no_sizes or NONE_FEWER
    if case.launch.gpus is None:
        return remedies.gpus(None, sizes[0], case.ladder.base)
    for size in sizes:
        if (gpus := _others(case, size)) is not None:
            return remedies.gpus(gpus, size, case.ladder.base)
    return "the others have failed too"


def _other_gpu(case: _Case) -> Remedy | str:
    """As many GPUs without the one that failed."""
    gpus = _others(case, len(case.launch.gpus or ()))
    if not gpus:
        return "gpus.spares names none that is left"
    return remedies.gpus(gpus, case.launch.tensor_parallel, case.ladder.base)


def _others(case: _Case, size: int) -> tuple[str, ...] | None:
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


_FINDERS: Final[Mapping[Want, tuple[Callable[[_Case], Remedy | str], Area, str]]] = {
    Want.TRANSPORT: (_transport, Area.TRANSPORTS, "peer-to-peer off"),
    Want.CUSTOM_ALL_REDUCE: (_only(remedies.CUSTOM_ALL_REDUCE_OFF), Area.TRANSPORTS, "vLLM's own all-reduce off"),
    Want.NVLS: (_only(remedies.NVLS_OFF), Area.TRANSPORTS, "NVLink SHARP off"),
    Want.CUMEM: (_only(remedies.CUMEM_OFF), Area.TRANSPORTS, "cuMem off"),
    Want.SHM: (_only(remedies.SHM_OFF), Area.TRANSPORTS, "shared memory off"),
    Want.NETWORK_INTERFACE: (_network_interface, Area.TRANSPORTS, "the loopback interface"),
    Want.MEMORY_LOWER: (_memory_lower, Area.UTILISATION, "less memory utilisation"),
    Want.MEMORY_RAISE: (_memory_raise, Area.UTILISATION, "more memory utilisation"),
    Want.CONTEXT_LENGTH: (_context_length, Area.CONTEXT_LENGTH, "a shorter context"),
    Want.DTYPE: (_dtype, Area.DTYPE, "float16"),
    Want.EAGER: (_eager, Area.GRAPH_CAPTURE, "no graph capture"),
    Want.FEWER_GPUS: (_fewer_gpus, Area.GPUS, "fewer GPUs"),
    Want.OTHER_GPU: (_other_gpu, Area.GPUS, "another GPU"),
}
