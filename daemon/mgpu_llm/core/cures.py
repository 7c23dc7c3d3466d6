"""Which remedy comes next, from what failed and why: what a cause wants, held against what there is and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from mgpu_llm.core import gpu_cures, memory_cures, remedies
from mgpu_llm.core.case import Case, Failure
from mgpu_llm.core.ladder import Ladder, Nvlink
from mgpu_llm.core.remedies import SEEN_BY_CLIENTS, Area, Remedy, Want

SO_ALREADY: Final = "it is so already"
ONE_RANK: Final = "there is one rank only"
#: From gentle to certain.
TRANSPORT_STEPS: Final[Mapping[Nvlink, tuple[Remedy, ...]]] = {
    Nvlink.ALL: (remedies.NVLINK_GENTLE, remedies.P2P_OFF),
    Nvlink.SOME: (remedies.P2P_NVLINK_ONLY, remedies.P2P_OFF),
    Nvlink.NONE: (remedies.P2P_OFF,),
}


@dataclass(frozen=True, kw_only=True)
class Out:
    """What a cause wants and cannot have. `forbidden`: only because the admin has not allowed it."""

    what: str
    why: str
    forbidden: bool = False

    @property
    def moot(self) -> bool:
        """Whether it would change nothing."""
        return self.why in (SO_ALREADY, ONE_RANK, gpu_cures.NONE_FEWER)


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
    answer = finder(Case(want=want, ladder=ladder, failures=failures))
    return Out(what=what, why=answer) if isinstance(answer, str) else answer


def _first_new(case: Case, *steps: Remedy) -> Remedy | str:
    """The first that would change anything."""
    launch = case.launch
    if launch.tensor_parallel * case.ladder.pipeline_parallel == 1:
        return ONE_RANK
    return next((step for step in steps if step.over(launch) != launch), SO_ALREADY)


def _only(remedy: Remedy) -> Callable[[Case], Remedy | str]:
    """For what one remedy gives."""
    return lambda case: _first_new(case, remedy)


def _transport(case: Case) -> Remedy | str:
    """The first that a preflight has seen to work, else the first of which it did not see that it fails."""
    seen = {name: works for failure in case.failures for name, works in failure.found.transports.items()}
    steps = [step for step in transports(case.ladder) if seen.get(step.name, step is not remedies.SOCKETS)]
    if not steps:
        return "none of them works"
    return _first_new(case, *sorted(steps, key=lambda step: step.name not in seen))


def _network_interface(case: Case) -> Remedy | str:
    if not case.ladder.one_host:
        return "other hosts take part, and cannot be reached through the loopback interface"
    return _first_new(case, remedies.LOOPBACK)


def _eager(case: Case) -> Remedy | str:
    return remedies.EAGER if remedies.EAGER.over(case.launch) != case.launch else SO_ALREADY


def _dtype(case: Case) -> Remedy | str:
    return remedies.FLOAT16 if remedies.FLOAT16.over(case.launch) != case.launch else SO_ALREADY


_FINDERS: Final[Mapping[Want, tuple[Callable[[Case], Remedy | str], Area, str]]] = {
    Want.TRANSPORT: (_transport, Area.TRANSPORTS, "peer-to-peer off"),
    Want.CUSTOM_ALL_REDUCE: (_only(remedies.CUSTOM_ALL_REDUCE_OFF), Area.TRANSPORTS, "vLLM's own all-reduce off"),
    Want.NVLS: (_only(remedies.NVLS_OFF), Area.TRANSPORTS, "NVLink SHARP off"),
    Want.CUMEM: (_only(remedies.CUMEM_OFF), Area.TRANSPORTS, "cuMem off"),
    Want.SHM: (_only(remedies.SHM_OFF), Area.TRANSPORTS, "shared memory off"),
    Want.NETWORK_INTERFACE: (_network_interface, Area.TRANSPORTS, "the loopback interface"),
    Want.MEMORY_LOWER: (memory_cures.lower, Area.UTILISATION, "less memory utilisation"),
    Want.MEMORY_RAISE: (memory_cures.higher, Area.UTILISATION, "more memory utilisation"),
    Want.CONTEXT_LENGTH: (memory_cures.shorter_context, Area.CONTEXT_LENGTH, "a shorter context"),
    Want.DTYPE: (_dtype, Area.DTYPE, "float16"),
    Want.EAGER: (_eager, Area.GRAPH_CAPTURE, "no graph capture"),
    Want.FEWER_GPUS: (gpu_cures.fewer, Area.GPUS, "fewer GPUs"),
    Want.OTHER_GPU: (gpu_cures.other, Area.GPUS, "another GPU"),
}
