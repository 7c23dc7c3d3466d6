"""What would be tried, in which order, and what would not and why: the decision itself, asked with nothing at stake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mgpu_llm.core import cures, decision, unusable
from mgpu_llm.core.case import Failure
from mgpu_llm.core.cures import Out
from mgpu_llm.core.diagnosis import TABLE, Diagnosis
from mgpu_llm.core.ladder import BASE, Rung
from mgpu_llm.core.remedies import DEFAULT_ORDER, Want
from mgpu_llm.core.states import Ended, Fail, Policy, Run, Try

UNKNOWN: Final = "unknown"
NONE_OUT: Final[Mapping[str, str]] = {}
_SUMMARIES: Final = {
    "engine-exited": "the engine ended while it loaded, for a reason that nobody knows",
    "died-while-serving": "the engine died too often while it served; each rung has several deaths",
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One rung that would be tried, `tries` times before the next."""

    rung: Rung
    tries: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens where every attempt fails for the same cause: the rungs in order, what the cause wants and cannot have, and
    with which exit status it ends. There are no rungs where the GPUs that are left do not suffice for one."""

    cause: str
    summary: str
    wants: tuple[Want, ...]
    rungs: tuple[Planned, ...]
    outs: tuple[Out, ...]
    status: int


def walk(policy: Policy, run: Run, rung: Rung) -> tuple[Planned, ...]:
    """The rungs that would follow `rung` for a cause that nobody knows, as far as the attempts of `run` and its GPUs leave it."""
    rungs, _ = _walk(
        policy,
        replace(
            run,
            ended=(),
            deaths=0,
            trial=None,
            rung=rung,
            tries=max(run.tries - 1, 0),
            struggle=max(run.struggle - 1, 0),
        ),
        _UNKNOWN,
    )
    return rungs[1:] if rungs and rungs[0].rung == rung else rungs


def plans(policy: Policy, cause: str = UNKNOWN, out: Mapping[str, str] = NONE_OUT) -> tuple[Plan, ...]:
    """What would be tried against `cause`: one plan for each way in which it may show. `out` are GPUs that must not be used, as
    in Run. Raises ValueError for none of the known causes."""
    if cause in (UNKNOWN, "died-while-serving"):
        return (_plan(policy, out, replace(_UNKNOWN, cause=cause), _SUMMARIES.get(cause, "")),)
    if cause == "engine-exited":
        retries = (Want.PLAIN_RETRY,) * (policy.crashes_per_rung - 1)
        return (_plan(policy, out, _failure(cause, retries + DEFAULT_ORDER), _SUMMARIES[cause]),)
    rows = [row for row in TABLE if cause in (row.id, row.reported_as) and row.wants]
    if not rows:
        raise ValueError(f'there is no cause "{cause}"')
    return tuple(_plan(policy, out, _failure(row.reported_as, row.wants), row.cause) for row in rows)


def causes() -> tuple[str, ...]:
    """Every cause that something may be done about, sorted."""
    return tuple(sorted({row.reported_as for row in TABLE if row.wants} | {"engine-exited", "died-while-serving"}))


def _failure(cause: str, wants: tuple[Want, ...]) -> Diagnosis:
    return Diagnosis(cause=cause, outcome="crashed", summary="", advice="", wants=wants)


_UNKNOWN: Final = _failure(UNKNOWN, DEFAULT_ORDER)


def _plan(policy: Policy, out: Mapping[str, str], found: Diagnosis, summary: str) -> Plan:
    rungs, status = _walk(policy, Run(out=out), found)
    first = (Failure(rung=BASE, found=found),)
    wanted = [want for want in dict.fromkeys(found.wants) if want not in (Want.PLAIN_RETRY, Want.STOP)]
    answers = [cures.find(want, policy.ladder, first) for want in wanted] if policy.ladder.own is None else []
    outs = tuple(answer for answer in answers if isinstance(answer, Out))
    return Plan(cause=found.cause, summary=summary, wants=found.wants, rungs=rungs, outs=outs, status=status)


def _walk(policy: Policy, run: Run, found: Diagnosis) -> tuple[tuple[Planned, ...], int]:
    """Every attempt fails so, until it is given up with that exit status."""
    rung, rungs = run.rung, list[Planned]()
    while True:
        sound = unusable.around(run, rung, policy)
        if isinstance(sound, Fail):
            return tuple(rungs), sound.status
        rung = sound
        run = decision.begun(run, rung)
        run = run.closed(
            Ended(
                number=run.attempt,
                rung=rung,
                outcome="crashed",
                phase="",
                ended_at=0.0,
                duration_s=0.0,
                diagnosis=found,
            )
        )
        if rungs and rungs[-1].rung == rung:
            rungs[-1] = replace(rungs[-1], tries=rungs[-1].tries + 1)
        else:
            rungs.append(Planned(rung=rung))
        then = decision.after_failed_load(run, policy)
        if isinstance(then, Fail):
            return tuple(rungs), then.status
        assert isinstance(then, Try), "a failed load is tried again or given up"  # noqa: S101 - for the type alone
        rung = then.rung
