"""How a failure goes on until the engine serves or the daemon gives up: its own decision, against what would truly cure it.

Every attempt fails with the same diagnosis until its settings have what cures the failure. That is told by the settings
themselves, as vLLM and NCCL read them, and not by the names of our remedies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from mgpu_llm.core import decision
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import BASE, Ladder
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import SEEN_BY_CLIENTS, Want
from mgpu_llm.core.states import Ended, Fail, Policy, Run, Try

#: Two GPUs of whose NVLink nobody knows, no spare one, a model that one of them holds, and the defaults of the config.
FIRST: Final = Launch(gpus=("0", "1"), tensor_parallel=2, utilisation=0.9)
POLICY: Final = Policy(ladder=Ladder(base=FIRST, sizes=(1,), spares=(), context=32_768))
#: Troubles among ranks: one rank has none of them, whatever its settings.
AMONG_RANKS: Final = frozenset(
    {Want.TRANSPORT, Want.CUSTOM_ALL_REDUCE, Want.NVLS, Want.CUMEM, Want.SHM, Want.NETWORK_INTERFACE}
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What fails, again and again. `ways` are the things that it may really be, by what cures each; `served`: the engine had
    come to service and then died."""

    found: Diagnosis
    ways: Sequence[Sequence[Want]]
    served: bool = False


@dataclass(frozen=True, kw_only=True)
class Struggle:
    """How it ended. `cure` is what cures it, in words; `attempts` how many there were, and `status` the daemon's exit status,
    None where the engine serves. `released` is the number of attempts where ladder.may_change is needed, and given.
    `wrong` says why it should not have ended so, `dear` what was given up for nothing; both are "" mostly. `at_once`: the first
    thing done was right."""

    cure: str
    attempts: int
    status: int | None
    released: int | None = None
    wrong: str = ""
    dear: str = ""
    at_once: bool = False


def struggles(failure: Failure) -> tuple[Struggle, ...]:
    """One for each thing that it may really be, and where one GPU is at fault for each GPU that may be it."""
    return tuple(_struggle(failure, way, bad) for way in failure.ways for bad in _suspects(failure.found, way))


def _suspects(found: Diagnosis, way: Sequence[Want]) -> tuple[str, ...]:
    gpus = FIRST.gpus or ()
    if Want.OTHER_GPU not in way:
        return ("",)
    return gpus if found.rank is None or found.rank >= len(gpus) else (gpus[found.rank],)


def _struggle(failure: Failure, way: Sequence[Want], bad: str) -> Struggle:
    policy = _policy(failure.found)
    tried, end = _run(failure, way, bad, policy)
    fought = Struggle(cure=_in_words(way), attempts=len(tried), status=None if end is None else end.status)
    if end is None:
        return replace(fought, dear=_dear(fought.cure, way, tried[-1]), at_once=len(tried) == 2)
    if Want.STOP in way:
        wrong = _in_vain(failure, tried, end)
        return replace(fought, wrong=wrong, at_once=len(tried) == 1 and not wrong)
    with_release, in_vain = _run(failure, way, bad, _released(policy))
    if in_vain is None and "ladder.may_change" in end.message:
        return replace(fought, released=len(with_release), at_once=len(tried) == 1)
    return replace(fought, wrong=f"given up although {fought.cure} would cure")


def _in_words(way: Sequence[Want]) -> str:
    return " or ".join("leaving that GPU out" if want is Want.OTHER_GPU else want.value for want in way)


def _policy(found: Diagnosis) -> Policy:
    """The policy for a model whose context is as long as the engine says, if it does."""
    ladder = POLICY.ladder
    return replace(POLICY, ladder=replace(ladder, context=int(found.figures.get("length", ladder.context or 0))))


def _released(policy: Policy) -> Policy:
    """The same, with what clients see released."""
    return replace(policy, ladder=replace(policy.ladder, areas=policy.ladder.areas | SEEN_BY_CLIENTS))


def _run(failure: Failure, way: Sequence[Want], bad: str, policy: Policy) -> tuple[tuple[Launch, ...], Fail | None]:
    """Every attempt's settings, and how it was given up; None where the last attempt serves."""
    run, rung, tried = Run(), BASE, list[Launch]()
    while True:
        run = decision.begun(run, rung)
        tried.append(policy.launch(rung))
        if len(tried) > 1 and any(_has(want, tried[-1], bad, failure.found) for want in way):
            return tuple(tried), None
        run, then = _failed(failure, run, policy)
        if isinstance(then, Fail):
            return tuple(tried), then
        rung = then.rung


def _failed(failure: Failure, run: Run, policy: Policy) -> tuple[Run, Try | Fail]:
    """As core/supervisor has it: of an engine that fails to load, or that dies soon after it served."""
    run = run.closed(_ended(run, failure.found))
    if failure.served:
        run = replace(run, tries=0, deaths=run.deaths + 1)
    then = decision.after_death(run, policy) if failure.served else decision.after_failed_load(run, policy)
    assert isinstance(then, Try | Fail)
    if failure.served and isinstance(then, Try) and then.rung != run.rung:
        run = replace(run, deaths=decision.deaths_carried_over(policy))
    return run, then


def _ended(run: Run, found: Diagnosis) -> Ended:
    return Ended(
        number=run.attempt,
        rung=run.rung,
        outcome=found.outcome,
        phase="",
        ended_at=0.0,
        duration_s=0.0,
        diagnosis=found,
    )


# -- what settings cure ------------------------------------------------------------------------------------------------


def _env(**variables: str) -> Callable[[Launch], bool]:
    return lambda launch: all(launch.env.get(name) == value for name, value in variables.items())


def _args(*words: str) -> Callable[[Launch], bool]:
    return lambda launch: all(word in launch.args for word in words)


def _part(launch: Launch) -> float:
    return launch.utilisation or 0.0


#: By what is wanted, how settings look that have it.
SETTINGS: Final[Mapping[Want, Callable[[Launch], bool]]] = {
    Want.TRANSPORT: lambda launch: _env(NCCL_P2P_DISABLE="1")(launch) and _args("--disable-custom-all-reduce")(launch),
    Want.CUSTOM_ALL_REDUCE: _args("--disable-custom-all-reduce"),
    # NVLS is built on cuMem.
    Want.NVLS: lambda launch: _env(NCCL_NVLS_ENABLE="0")(launch) or _env(NCCL_CUMEM_ENABLE="0")(launch),
    Want.CUMEM: _env(NCCL_CUMEM_ENABLE="0"),
    Want.SHM: _env(NCCL_SHM_DISABLE="1"),
    Want.NETWORK_INTERFACE: _env(NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1"),
    Want.MEMORY_LOWER: lambda launch: _part(launch) < _part(FIRST),
    Want.MEMORY_RAISE: lambda launch: _part(launch) > _part(FIRST),
    Want.CONTEXT_LENGTH: _args("--max-model-len"),
    Want.DTYPE: _args("--dtype", "float16"),
    Want.EAGER: _args("--enforce-eager"),
    Want.FEWER_GPUS: lambda launch: launch.tensor_parallel < FIRST.tensor_parallel,
}


def _has(want: Want, launch: Launch, bad: str, found: Diagnosis) -> bool:
    """Whether an attempt with these settings, which is not the first, has what is wanted. `bad` is the GPU at fault."""
    if want in (Want.PLAIN_RETRY, Want.STOP):
        return want is Want.PLAIN_RETRY
    if want is Want.OTHER_GPU:
        return bad not in (launch.gpus or ())
    if want is Want.MEMORY_LOWER and not _part(launch) <= _free(found):
        return False
    return SETTINGS[want](launch) or (want in AMONG_RANKS and launch.tensor_parallel == 1)


def _free(found: Diagnosis) -> float:
    """The part of the GPU that the engine said is free, 1 where it did not say."""
    free, total = found.figures.get("free"), found.figures.get("total")
    return free / total if free and total else 1.0


def _dear(cure: str, way: Sequence[Want], last: Launch) -> str:
    """What was given up for nothing in coming to service."""
    if tuple(way) == (Want.PLAIN_RETRY,) and last != FIRST:
        return "settings changed although the same again would do"
    if last.tensor_parallel == 1 and not {Want.FEWER_GPUS, Want.OTHER_GPU}.intersection(way):
        return f"one GPU although {cure} would do"
    return ""


def _in_vain(failure: Failure, tried: Sequence[Launch], end: Fail) -> str:
    """What is wrong with having stopped so, where nothing helps. Where other things were as likely, those may be tried."""
    likely = {want for way in failure.ways for want in way}
    changes = [(before, after) for before, after in pairwise(tried) if before != after]
    if not all(any(_brings(want, *change) for want in likely) for change in changes):
        return "settings changed although nothing helps"
    if likely == {Want.STOP} and (len(tried), end.status) != (1, decision.DO_NOT_RETRY):
        return f"stopped with {end.status} after {len(tried)} attempts although nothing helps"
    return ""


def _brings(want: Want, before: Launch, after: Launch) -> bool:
    return want in SETTINGS and SETTINGS[want](after) and not SETTINGS[want](before)
