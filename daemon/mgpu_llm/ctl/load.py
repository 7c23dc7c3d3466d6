"""A load in words: how far it is, how fast it goes, how long it may yet take, and its phases as a table."""

from __future__ import annotations

from mgpu_llm.core.status import PhaseStatus, Status
from mgpu_llm.ctl.words import Page, about, columns, limit, percent, plain, rate, span


def phase_words(status: Status) -> str:
    """ "weights 38 %, 120 MB/s, about 9 min left"; what cannot be known of it is not said."""
    done = _percent(status)
    words = [status.phase, *progress(status)] if done is None else [f"{status.phase} {percent(done)}"]
    return plain(", ".join([*words, *pace(status)]))


def pace(status: Status) -> list[str]:
    """How fast the weights come in, and about how long it takes until the model is served."""
    speed = status.weights_bytes_per_s if status.phase == "weights" else None
    words = [] if speed is None else [rate(speed)]
    return words if status.left_s is None else [*words, f"{about(status.left_s)} left"]


def progress(status: Status) -> list[str]:
    """What can be counted of the phase: "shards 3/8"."""
    counts = (("shards", status.shards if status.phase == "weights" else None), ("graphs", status.graphs))
    return [f"{name} {count.done}/{count.total}" for name, count in counts if count is not None]


def steps(status: Status) -> str:
    """Where it has come to, in words that change in steps: with a clock in them every question would be news."""
    words = [status.state]
    if status.state in ("checking", "starting", "ready"):
        words += [f"attempt {status.attempt} on rung {status.rung}"]
    if status.state == "starting":
        words += [status.phase, *progress(status)]
    if status.degraded and status.state == "ready":
        words += ["degraded"]
    return plain(", ".join(words))


def quiet_words(status: Status) -> str:
    if status.quiet_s is None:
        return ""
    if status.patience_s is None:
        return f"nothing has moved for {span(status.quiet_s)}"
    return f"nothing has moved for {span(status.quiet_s)}; after {limit(status.patience_s)} a stall is suspected"


def phases_table(status: Status, page: Page) -> list[str]:
    """A row for each phase: what it took or is taking, what it usually takes on this host, how long it may be quiet."""
    if not status.phases:
        return []
    seen = any(phase.usual_s is not None for phase in status.phases)  # not so on this host's first start of the model
    heads = ("", "TOOK", *(("USUALLY",) if seen else ()), "QUIET AT MOST")
    rows = [(phase.name, _took(phase), *((usual(phase),) if seen else ()), patience(phase)) for phase in status.phases]
    head, *table = columns([heads, *rows])
    lines = [page.paint(head, dim=True)]
    for phase, row in zip(status.phases, table, strict=True):
        lines += [page.paint(row, bold=phase.standing == "current", dim=phase.standing == "to-come")]
    return lines


def usual(phase: PhaseStatus) -> str:
    return "" if phase.usual_s is None else span(phase.usual_s)


def patience(phase: PhaseStatus) -> str:
    return f"{limit(phase.patience_s)} (learnt)" if phase.learnt else limit(phase.patience_s)


def taken(phase: PhaseStatus) -> str:
    """An eager engine compiles nothing: a phase may be behind us and have left no trace."""
    if phase.took_s is None:
        return "not seen" if phase.standing == "done" else ""
    return span(phase.took_s)


def _took(phase: PhaseStatus) -> str:
    running = phase.standing == "current" and phase.took_s is not None
    return f"{taken(phase)} so far" if running else taken(phase)


def _percent(status: Status) -> float | None:
    current = next((phase.percent for phase in status.phases if phase.standing == "current"), None)
    return status.weights_percent if status.phase == "weights" and status.weights_percent is not None else current
