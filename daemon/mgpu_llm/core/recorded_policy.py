"""The first row of a recording: everything that the judgement of the attempt, and the decision after it, depend on; and the row
that tells of a change of that meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from mgpu_llm.core import decision, readings, recording, remedies
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import BASE, Heads, Ladder, Nvlink, Rung, smaller
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.recording import Recording, RecordingError, Row
from mgpu_llm.core.remedies import Area, Remedy, Want
from mgpu_llm.core.states import Ended, Policy, Run

#: As the config allows.
MOST_RANKS: Final = 1024
#: Each single variable and argument that remedies set, by how it is written.
_PIECES: Final = {
    name: piece
    for remedy in remedies.FIXED.values()
    for name, piece in (
        *((f"{name}={value}", Remedy(name=name, env={name: value})) for name, value in remedy.env.items()),
        *([(" ".join(remedy.args), Remedy(name="args", args=remedy.args))] if remedy.args else []),
    )
}
_BROKEN: Final = (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError)


def header(policy: Policy, run: Run) -> Row:
    """The first row of a recording of the attempt that `run` has just begun. The inverse of `policy_of` and `run_of`."""
    return recording.note(
        0.0,
        "attempt",
        format=recording.FORMAT,
        attempt=run.attempt,
        rung=run.rung.name,
        tries=run.tries,
        struggle=run.struggle,
        deaths=run.deaths,
        trial=run.trial and run.trial.name,
        failed=[_failed(ended) for ended in decision.failed_in_a_row(run)],
        **_rules(policy),
    )


def reloaded(policy: Policy, run: Run, t: float) -> Row:
    """The row that says, `t` seconds after the spawn, that another policy holds from now on. The inverse of `policy_from`."""
    return recording.note(t, "policy", format=recording.FORMAT, rung=run.rung.name, **_rules(policy))


def _rules(policy: Policy) -> dict[str, Any]:
    return {
        "ladder": _ladder(policy.ladder),
        "patience": {phase.label: seconds for phase, seconds in policy.allowed.items()},
        "stacks": policy.look_at_stacks,
        "attempts": policy.attempts,
        "tries_per_cause": policy.tries_per_cause,
        "crashes_per_rung": policy.crashes_per_rung,
        "backoff": [policy.backoff_s, policy.backoff_ceiling_s, policy.backoff_jitter, policy.seed],
        "weights_bytes": policy.weights_bytes,
    }


def policy_from(recorded: Recording, row: Row) -> Policy:
    """How the recording was judged from this row on. Raises RecordingError where it is broken."""
    return policy_of(replace(recorded, header=row), f"the policy row at t={row['t']}")


def policy_of(recorded: Recording, what: str = "its first row") -> Policy:
    """How the recording was judged, at the beginning. Raises RecordingError where its header is broken, which is called
    `what`."""
    given = recorded.header
    try:
        if given.get("format", recording.FORMAT) != recording.FORMAT:
            raise ValueError(f"it has format {given.get('format')!r}, and this version knows {recording.FORMAT}")
        policy = Policy(ladder=_ladder_of(recorded), learn_factor=None)
        if given.get("ladder") is not None:
            policy.ladder.rung(given["rung"])
        patience = {phase: float(given.get("patience", {}).get(phase.label, s)) for phase, s in policy.patience.items()}
        if not all(0 < seconds < math.inf for seconds in patience.values()):
            raise ValueError("a patience is no time in seconds")
        backoff_s, ceiling_s, jitter, seed = (*given.get("backoff", (2.0, 60.0)), 0.0, 0)[:4]
        return replace(
            policy,
            patience=patience,
            look_at_stacks=bool(given.get("stacks", True)),
            attempts=_within(given.get("attempts", policy.attempts), 1, 1000),
            tries_per_cause=_within(given.get("tries_per_cause", policy.tries_per_cause), 1, 1000),
            crashes_per_rung=_within(given.get("crashes_per_rung", policy.crashes_per_rung), 1, 1000),
            backoff_s=_finite(backoff_s),
            backoff_ceiling_s=_finite(ceiling_s),
            backoff_jitter=_finite(jitter),
            seed=int(seed),
            weights_bytes=readings.count(given.get("weights_bytes")),
        )
    except _BROKEN as error:
        raise RecordingError(f"{what} is broken: {error}") from error


def run_of(recorded: Recording, policy: Policy) -> Run:
    """The attempt that was recorded. A ladder that is not the recording's own may not know its rung: then it is the base.
    Raises RecordingError where its header is broken."""
    given = recorded.header
    try:
        trial = given.get("trial")
        return Run(
            attempt=int(given.get("attempt", 1)),
            rung=_rung(policy.ladder, given.get("rung")),
            tries=_within(given.get("tries", 1), 0, 100_000),
            struggle=_within(given.get("struggle", given.get("tries", 1)), 0, 100_000),
            deaths=_within(given.get("deaths", 0), 0, 1000),
            trial=None if trial is None else _rung(policy.ladder, trial),
            ended=tuple(_ended(policy.ladder, number, row) for number, row in enumerate(_few(given.get("failed", ())))),
        )
    except _BROKEN as error:
        raise RecordingError(f"its first row is broken: {error}") from error


def _rung(ladder: Ladder, name: object) -> Rung:
    try:
        return ladder.rung(str(name))
    except ValueError:
        return BASE


def _failed(ended: Ended) -> dict[str, Any]:
    found = ended.diagnosis
    assert found is not None, "it is among the failed"  # noqa: S101 - for the type alone
    return {
        "rung": ended.rung.name,
        "outcome": ended.outcome,
        "cause": found.cause,
        "wants": [want.value for want in found.wants],
        "rank": found.rank,
        "gpus": list(found.gpus),
        "transports": dict(found.transports),
    }


def _ended(ladder: Ladder, number: int, row: Mapping[str, Any]) -> Ended:
    """As much of an earlier failure as the next decision asks for."""
    found = Diagnosis(
        cause=str(row["cause"]),
        outcome=str(row["outcome"]),
        summary="",
        advice="",
        wants=tuple(Want(want) for want in row["wants"]),
        rank=readings.count(row.get("rank")),
        gpus=_texts(row.get("gpus", ())),
        transports={str(name): bool(works) for name, works in row.get("transports", {}).items()},
    )
    return Ended(
        number=number + 1,
        rung=_rung(ladder, row["rung"]),
        outcome=found.outcome,
        phase="",
        ended_at=0.0,
        duration_s=0.0,
        diagnosis=found,
    )


def _ladder(ladder: Ladder) -> dict[str, Any]:
    """Of the admin's own arguments and variables only which remedies are in them already: the rest may be secret."""
    base = ladder.base
    return {
        "tp": base.tensor_parallel,
        "pp": ladder.pipeline_parallel,
        "gpus": base.gpus and list(base.gpus),
        "utilisation": base.utilisation,
        "has": _pieces(base),
        "may_change": sorted(ladder.areas),
        "sizes": list(ladder.sizes),
        "lowest": [[size, value] for size, value in ladder.lowest.items()],
        "steps": [ladder.step, ladder.floor, ladder.ceiling],
        "nvlink": ladder.nvlink.value,
        "spares": list(ladder.spares),
        "context": ladder.context,
        "one_host": ladder.one_host,
        "own": None if ladder.own is None else [remedy.name for remedy in ladder.own],
    }


def _pieces(base: Launch) -> list[str]:
    """What remedies would set and the admin has set so already: a remedy whose every piece is there changes nothing."""
    return [name for name, piece in _PIECES.items() if piece.over(base) == base]


def _ladder_of(recorded: Recording) -> Ladder:
    given = recorded.header.get("ladder")
    if given is None:
        return _usual(recorded)
    gpus = given["gpus"]
    base = Launch(
        gpus=None if gpus is None else _texts(gpus),
        tensor_parallel=_within(given["tp"], 1, MOST_RANKS),
        utilisation=None if given["utilisation"] is None else _finite(given["utilisation"]),
    )
    for piece in _texts(given["has"]):
        base = _PIECES[piece].over(base)
    step, floor, ceiling = given["steps"]
    if not 0.001 <= float(step) <= 1:
        raise ValueError("a step of the utilisation is no fraction")
    return Ladder(
        base=base,
        pipeline_parallel=_within(given["pp"], 1, MOST_RANKS),
        areas=frozenset(Area(area) for area in given["may_change"]),
        sizes=tuple(_within(size, 1, MOST_RANKS) for size in _few(given["sizes"])),
        lowest={_within(size, 1, MOST_RANKS): _finite(value) for size, value in _few(given.get("lowest", ()))},
        step=_finite(step),
        floor=_finite(floor),
        ceiling=_finite(ceiling),
        nvlink=Nvlink(given["nvlink"]),
        spares=_texts(given["spares"]),
        context=readings.count(given["context"]),
        one_host=bool(given["one_host"]),
        own=None if given["own"] is None else tuple(Remedy(name=name) for name in _texts(given["own"])),
    )


def _usual(recorded: Recording) -> Ladder:
    """Of a recording that says nothing of it: the default one for as many GPUs as were sampled."""
    seen = max((len(row.get("gpus") or ()) for row in recorded.rows if row["kind"] == "sample"), default=0)
    size = _within(recorded.header.get("tp", seen or 2), 1, MOST_RANKS)
    on_gpus = recorded.has_gpus or any(row[2] for row in recorded.header.get("rungs", ()))
    gpus = tuple(str(index) for index in range(seen or size)) if on_gpus else None
    base = Launch(gpus=gpus, tensor_parallel=size, utilisation=0.9 if on_gpus else None)
    return Ladder(base=base, sizes=smaller(size, Heads()))


def _texts(given: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(text) for text in _few(given))


def _few(given: Any) -> Sequence[Any]:
    if len(given) > MOST_RANKS:
        raise ValueError(f"it lists more than {MOST_RANKS} of something")
    return tuple(given)


def _within(value: Any, least: int, most: int) -> int:
    number = readings.integer(value)
    if not least <= number <= most:
        raise ValueError(f"{number} is not from {least} to {most}")
    return number


def _finite(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= 1e9:
        raise ValueError(f"{number} is no number to go by")
    return number
