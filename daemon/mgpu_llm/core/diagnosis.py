"""Why an attempt ended, with the evidence, and what may cure it."""

from __future__ import annotations

import re
import signal as _signals
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mgpu_llm.core import engine_log, signatures, symptoms, xid
from mgpu_llm.core.engine_log import Line, Phase
from mgpu_llm.core.remedies import DEFAULT_ORDER, Want
from mgpu_llm.core.signatures import Role, Signature, Where
from mgpu_llm.core.stall import Stalled

TABLE: Final = signatures.load()
_ERRORS: Final = frozenset({Where.ERROR, Where.ANY})
_WORDS: Final = frozenset({Where.ANY})
_KERNEL: Final = frozenset({Where.KERNEL})
_EXIT: Final = frozenset({Where.EXIT})
_PREFLIGHT: Final = frozenset({Where.PREFLIGHT})
_ANCHORS: Final = {
    where: tuple((anchor, row) for row in TABLE if row.where in where for anchor in row.anchors)
    for where in (_ERRORS, _WORDS, _KERNEL, _EXIT, _PREFLIGHT)
}
#: So many hints are kept: what is said over and over in other words helps nobody.
MOST_HINTS: Final = 5
_NUMBER: Final = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?")
_WORKER: Final = re.compile(r"Worker_TP([0-9]{1,4})")
#: Some versions of vLLM ask the hub about a model although it is a local folder, print the refusal as an error, and go on.
_HARMLESS: Final = re.compile(r"^Error retrieving ")


#: Others hold so much of a GPU that the engine ends.
TAKEN: Final = "gpu-not-free"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why an attempt ended. `outcome`: stalled, crashed, refused or died (while serving).

    `wants` is what may cure it, in the order in which it is worth trying. `figures` are what the engine's words measured, by the
    name that the signature gives them, and `rank` is the tensor-parallel rank that failed, where it is known. `gpus` are those
    that must not be used any more, as entries of CUDA_VISIBLE_DEVICES, and `transports` says which ways for them to talk to each
    other were seen to work, or not to.
    """

    cause: str
    outcome: str
    summary: str
    advice: str
    evidence: tuple[str, ...] = ()
    wants: tuple[Want, ...] = DEFAULT_ORDER
    figures: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    gpus: tuple[str, ...] = ()
    transports: Mapping[str, bool] = field(default_factory=dict)

    @property
    def spared(self) -> bool:
        """Whether others hold a GPU, and no load was made: that is a wait, and says nothing of the settings."""
        return self.outcome == "averted" and self.cause == TAKEN

    @property
    def hopeless(self) -> bool:
        """Whether nothing helps until somebody changes something."""
        return self.wants[:1] == (Want.STOP,)


@dataclass(frozen=True, kw_only=True)
class Clue:
    """What the engine's own words gave away: the first root cause named, and the first error line. `cascade` is the line of
    a failure that has its root elsewhere but is all there is until a root is named; `passed` are the rows of all such failures
    so far; `hints` say what else may matter. `by_kernel`: it was the kernel that named the cause. `process` is who said it.
    `gpus` are those that the kernel has called unusable, as entries of CUDA_VISIBLE_DEVICES."""

    cause: str = ""
    line: str = ""
    process: str = ""
    error: str = ""
    cascade: str = ""
    hints: tuple[str, ...] = ()
    passed: frozenset[str] = field(default=frozenset(), compare=False)
    by_kernel: bool = False
    gpus: tuple[str, ...] = ()


def look(clue: Clue, line: Line) -> Clue:
    """Add one line to what is known. Mostly only errors count: warnings name the same causes and are survived. The first root
    cause stands: what follows it is its consequence."""
    message = line.message
    error = engine_log.is_error(line) and not _HARMLESS.match(message)
    row = _said(message, _ERRORS if error else _WORDS)
    seen = _with_row(clue, row, message.strip(), line.process) if row is not None else clue
    passed_on = row is not None and row.role is not Role.ROOT
    if error and not seen.error and not passed_on and engine_log.names_an_error(message):
        return replace(seen, error=message.strip())
    return seen


def look_at_kernel(clue: Clue, text: str, gpus: tuple[str, ...] = ()) -> Clue:
    """Add one line of the kernel's log, which names `gpus`."""
    row = _said(text, _KERNEL)
    told = clue if row is None else _with_row(clue, row, text.strip())
    error = xid.read(text)
    if error is None or error.action not in xid.UNFIT:
        return told
    return replace(told, gpus=tuple(dict.fromkeys((*told.gpus, *gpus))))


def of_stall(stalled: Stalled, clue: Clue) -> Diagnosis:
    """Nothing moves any more. A cause that the engine named explains more than the silence after it, unless it says that
    nothing can help: then the engine would have ended."""
    if (named := _named(clue, stalled.phase)) is not None and not named.hopeless:
        return named
    row = symptoms.explain(stalled, TABLE)
    what = "nothing but small signals" if stalled.feeble else "nothing"
    before = (f'error before: "{clue.error}"',) if clue.error else ()
    return Diagnosis(
        cause=row.reported_as,
        outcome="stalled",
        summary=row.cause.format(
            quiet=f"stalled in {stalled.phase.label}: {what} moved for {stalled.idle_s:.0f} s",
            spins=", while something spins" if stalled.spinning else "",
            stopped=", ".join(stalled.stopped),
            lock_waits=", ".join(stalled.lock_waits),
            storage_waits=", ".join(stalled.storage_waits),
            thrashing=stalled.thrashing,
        ),
        advice=row.advice,
        evidence=(*stalled.evidence, *before, *clue.hints),
        wants=row.wants,
    )


def of_exit(status: int, phase: Phase, clue: Clue, *, retries: int) -> Diagnosis:
    """The engine ended by itself while loading, with `status` as subprocess gives it."""
    how = describe_status(status)
    if named := _named(clue, phase):
        return named
    if not clue.error and (row := _said(how, _EXIT)):
        return _of_row(row, how, clue)
    error = f": {clue.error}" if clue.error else ""
    return Diagnosis(
        cause="engine-exited",
        outcome="crashed",
        summary=f"the engine ended in {phase.label} with {how}{error}",
        advice="read the engine's last lines (mgpuctl logs)",
        evidence=((f'error: "{clue.error}"',) if clue.error else ()) + clue.hints,
        wants=(Want.PLAIN_RETRY,) * retries + DEFAULT_ORDER,
    )


def of_death(what: str, clue: Clue) -> Diagnosis:
    """A serving engine died or stopped answering; `what` says which. `clue` is from its last words."""
    named = _named(clue, None)
    # The same again is what follows a death anyhow.
    helps = named is not None and not {*named.wants} <= {Want.PLAIN_RETRY, Want.STOP}
    by_kernel = named if clue.by_kernel else None
    why = by_kernel.summary if by_kernel else clue.error
    return Diagnosis(
        cause=named.cause if named else "died-while-serving",
        outcome="died",
        summary=what + (f": {why}" if why else ""),
        advice=named.advice
        if named
        else "read the engine's last lines (mgpuctl logs) and the kernel's log for Xid errors",
        evidence=((f'error: "{clue.error}"',) if clue.error else ()) + (by_kernel.evidence if by_kernel else ()),
        wants=named.wants if named is not None and helps else DEFAULT_ORDER,
        figures=named.figures if named else {},
        rank=named.rank if named else None,
        gpus=named.gpus if named else (),
    )


def of_unfit_gpus(
    cause: str, summary: str, gpus: tuple[str, ...], evidence: tuple[str, ...], *, served: bool
) -> Diagnosis:
    """GPUs of a loading or serving engine cannot be used any more; it may not have noticed. `cause` is one of the table's."""
    row = next(row for row in TABLE if row.reported_as == cause and row.where is Where.KERNEL)
    return Diagnosis(
        cause=cause,
        outcome="died" if served else "crashed",
        summary=summary,
        advice=row.advice,
        evidence=evidence,
        wants=(*row.wants, Want.STOP),
        gpus=gpus,
    )


def of_preflight(sentence: str, evidence: tuple[str, ...]) -> Diagnosis:
    """A check has found what this load would fail of, as `sentence` says it; it was ended before it came there."""
    sentence = " ".join(sentence.split())  # what a recording from elsewhere has in it may have any form
    row = _said(sentence, _PREFLIGHT)
    assert row is not None, f"no row for {sentence}"  # noqa: S101 - our own sentences, and our own table
    return replace(_of_row(row, sentence, Clue()), outcome="averted", evidence=evidence)


def of_spawn(reason: str, *, hopeless: bool, rank: int | None = None) -> Diagnosis:
    """No engine came to be; where others hold the GPU of `rank`, because it would have ended for that."""
    row = None if rank is None else _said(reason, _PREFLIGHT)
    if row is not None:
        return replace(_of_row(row, reason, Clue()), outcome="averted", evidence=(), rank=rank)
    return Diagnosis(
        cause="cannot-spawn",
        outcome="crashed",
        summary=reason,
        advice="correct what it names: engine.command, engine.python or engine.port",
        wants=(Want.STOP,) if hopeless else (Want.PLAIN_RETRY,) * 2,
    )


def of_refused_completion(detail: str) -> Diagnosis:
    """The server is up and says that it will never answer our one-token request."""
    return Diagnosis(
        cause="completion-refused",
        outcome="refused",
        summary=f"the server refuses a one-token request: {detail}",
        advice="check model.served_name and the API key in engine.args or engine.env",
        wants=(Want.STOP,),
    )


def describe_status(status: int) -> str:
    """A process's end in words: "exit code 1", "signal 9 (SIGKILL)"."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {-status} ({_signals.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


def _said(message: str, where: frozenset[Where]) -> Signature | None:
    """The first row whose words are in the line. An engine may print a hundred thousand lines a second: each costs little."""
    for anchor, row in _ANCHORS[where]:
        if anchor in message and row.match(message):
            return row
    return None


def _with_row(clue: Clue, row: Signature, message: str, process: str = "") -> Clue:
    if row.kind is signatures.Kind.LATENT:
        hint = _told(row, message)
        return clue if hint in clue.hints else replace(clue, hints=(*clue.hints, hint)[:MOST_HINTS])
    if row.role is Role.ROOT and row.kind is not signatures.Kind.SLOW and not clue.cause:
        by_kernel = row.where is Where.KERNEL
        error = clue.error or ("" if by_kernel else message)
        return replace(clue, cause=row.reported_as, line=message, process=process, error=error, by_kernel=by_kernel)
    if row.role is not Role.CASCADE:
        return clue
    # An error that came before, even one that nobody knows, says more than that something failed.
    tells = row.wants and not clue.error and clue.passed.isdisjoint(row.unless)
    cascade = clue.cascade or (message if tells else "")
    return replace(clue, cascade=cascade, passed=clue.passed | {row.id})


def _named(clue: Clue, phase: Phase | None) -> Diagnosis | None:
    """The cause that was named, told by the row for this phase where several have the same words. What failed elsewhere is the
    cause as long as nothing better was said."""
    line = clue.line if clue.cause else clue.cascade
    where = _KERNEL if clue.by_kernel else _ERRORS
    rows = [row for row in TABLE if row.wants and row.where in where and row.match(line)]
    rows = [row for row in rows if row.reported_as == clue.cause or not clue.cause]
    if not rows:
        return None
    return _of_row(next((row for row in rows if row.holds_in(phase)), rows[0]), line, clue)


def _of_row(row: Signature, line: str, clue: Clue) -> Diagnosis:
    # Only what wants them gone is about GPUs; with the same ones nothing helps then.
    gpus = clue.gpus if Want.OTHER_GPU in row.wants else ()
    return Diagnosis(
        cause=row.reported_as,
        outcome="refused" if Want.STOP in row.wants else "crashed",
        summary=_told(row, line),
        advice=row.advice,
        evidence=(f'the {"kernel" if clue.by_kernel else "engine"} said: "{line[:300]}"', *clue.hints),
        wants=(*row.wants, Want.STOP) if gpus else row.wants,
        figures=_figures(row, line),
        rank=_rank(row, line, clue.process),
        gpus=gpus,
    )


def _figures(row: Signature, line: str) -> dict[str, float]:
    """What the row's pattern has found that is a number."""
    match = row.match(line)
    found = match.groupdict() if match is not None else {}
    return {name: float(text) for name, text in found.items() if text and _NUMBER.fullmatch(text)}


def _rank(row: Signature, line: str, process: str) -> int | None:
    """Which rank failed: the device that the line names (each engine counts its own from 0), or the worker that said it. With
    pipeline parallelism a worker's name has more than the one number, and its GPU is not told by it."""
    match = row.match(line)
    device = match.groupdict().get("device") if match is not None else None
    worker = _WORKER.fullmatch(process)
    return int(device) if device and _NUMBER.fullmatch(device) else int(worker[1]) if worker else None


def _told(row: Signature, line: str) -> str:
    """The row's sentence, with what its pattern has found in the line."""
    match = row.match(line)
    return row.cause.format(**match.groupdict()) if match is not None else row.cause
