"""The pages of mgpuctl: status, attempts and ladder as people read them, from values to lines."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu_llm.core.status import AttemptStatus, RungStatus, Status
from mgpu_llm.ctl.gpus_in_status import gpu_lines
from mgpu_llm.ctl.load import phase_words, phases_table, quiet_words
from mgpu_llm.ctl.words import Page, columns, plain, span

#: Attempts that ended in these ways have a cause that somebody should read.
FAILURES = frozenset({"stalled", "crashed", "refused", "died", "averted"})
#: More failed attempts than these are only counted in `status`; `attempts` shows all that the daemon still knows.
FAILURES_SHOWN = 5
COLOURS = {"ready": "green", "failed": "red", "stopped": None}
LABEL = 9

NEXT = {
    "starting": (("mgpuctl status --watch", "follow the start"), ("mgpuctl logs", "the engine's last lines")),
    "checking": (("mgpuctl status --watch", "follow the start"),),
    "backoff": (("mgpuctl attempts", "why the last attempt ended"), ("mgpuctl ladder", "what is tried next")),
    "terminating": (("mgpuctl status --watch", "follow the stop"),),
    "killing": (("mgpuctl status --watch", "follow the stop"),),
    "stopped": (("mgpuctl start", "bring the engine to service"),),
    "failed": (
        ("mgpuctl attempts", "every attempt with its evidence"),
        ("mgpuctl logs", "the engine's last lines"),
        ("mgpuctl start", "try again, once the cause is mended"),
    ),
}
NEXT_DEGRADED = (
    ("mgpuctl attempts", "why the settings were changed"),
    ("mgpuctl ladder", "this rung among the others"),
)


def status_lines(status: Status, page: Page) -> list[str]:
    degraded = status.degraded and status.state == "ready"
    colour = "yellow" if degraded else COLOURS.get(status.state, "yellow")
    lines = [f"{page.paint(page.bullet, colour)} mgpu-llm {plain(status.version)} - {plain(status.model)}"]
    state = f"{status.state}, degraded (rung {status.rung})" if degraded else status.state
    lasting = f" for {span(status.elapsed_s)}" if status.elapsed_s > 0 else ""
    lines += [f"{'State':>{LABEL}}: {page.paint(plain(state), colour, bold=True)}{lasting}"]
    lines += _field("Status", page.wrap(status.headline, LABEL + 2))
    if status.state not in ("stopped", "failed"):
        lines += _settings_fields(status, page)
    lines += _engine_fields(status, page)
    lines += _field("GPUs", gpu_lines(status, page, LABEL + 2))
    lines += _field("GPU out", [line for out in status.gpus_out for line in page.wrap(out, LABEL + 2)])
    lines += _field("GPU fault", [line for fault in status.gpu_faults for line in page.wrap(fault, LABEL + 2)])
    lines += _failures(status, page)
    return lines + _next(status, page)


def _settings_fields(status: Status, page: Page) -> list[str]:
    """What is not as configured: since when, why, what it costs unless the headline has said so, and how to come back."""
    since = way_back = ""
    if status.degradation is not None:
        cause = status.degradation.cause
        since = f"since {status.degradation.since}" + (f", because of {cause}" if cause else "")
        way_back = status.degradation.way_back
    return [
        *_field("Degraded", page.wrap(since, LABEL + 2)),
        *_field("Cost", page.wrap("" if status.cost in status.headline else status.cost, LABEL + 2)),
        *_field("Changes", [plain(change) for change in status.changes]),
        *_field("Way back", page.wrap(way_back, LABEL + 2)),
    ]


def _engine_fields(status: Status, page: Page) -> list[str]:
    if status.state in ("stopped", "failed"):
        return _field("URL", [f"{plain(status.url)} (not served)"])
    lines = _field("URL", [plain(status.url) if status.state == "ready" else f"{plain(status.url)} (not served yet)"])
    attempt = [f"{status.attempt} on rung {plain(status.rung)}"]
    if status.pid is not None:
        attempt += [f"pid {status.pid}, {_plural(status.processes, 'process', 'processes')}"]
        attempt += [f"{status.lines_dropped} lines of its output dropped"] if status.lines_dropped else []
    lines += _field("Attempt", page.wrap(", ".join(attempt), LABEL + 2))
    lines += _field("Preflight", page.wrap(status.preflight, LABEL + 2))
    if status.retry_in_s is not None:
        lines += _field("Retry", [f"in {span(status.retry_in_s)}"])
    return lines + (_load_fields(status, page) if status.state == "starting" else [])


def _load_fields(status: Status, page: Page) -> list[str]:
    lines = _field("Phase", [page.paint(phase_words(status), bold=True)])
    suspicion = page.wrap(status.suspicion.removeprefix("suspected: "), LABEL + 2)
    lines += _field("Suspicion", [page.paint(line, "yellow") for line in suspicion])
    if not suspicion:  # which tells the quiet too
        lines += _field("Quiet", page.wrap(quiet_words(status), LABEL + 2))
    return lines + _field("Phases", phases_table(status, page))


def _failures(status: Status, page: Page) -> list[str]:
    failed = [attempt for attempt in status.attempts if attempt.outcome in FAILURES]
    if not failed:
        return []
    lines = ["", page.paint("Failed attempts:", bold=True)]
    if hidden := len(failed) - len(failed[-FAILURES_SHOWN:]):
        lines.append(f"  ({hidden} earlier: mgpuctl attempts)")
    for attempt in failed[-FAILURES_SHOWN:]:
        head = f"{attempt.number} on rung {attempt.rung}: {attempt.outcome} in {attempt.phase} after {_lasted(attempt)}"
        lines += [f"  {page.paint(plain(head), 'red')}"]
        lines += _diagnosis(attempt, page, indent=4)
    return lines


def _lasted(attempt: AttemptStatus) -> str:
    ago = "" if attempt.ended_ago_s is None else f", {span(attempt.ended_ago_s)} ago"
    return f"{span(attempt.duration_s)}{ago}"


def _diagnosis(attempt: AttemptStatus, page: Page, *, indent: int) -> list[str]:
    lines: list[str] = []
    told = (attempt.cause, attempt.summary, attempt.advice, attempt.incident)
    for label, text in zip(("cause", "what", "to do", "kept"), told, strict=True):
        wrapped = page.wrap(text, indent + 7)
        lines += [f"{' ' * indent}{label if n == 0 else '':<6} {line}" for n, line in enumerate(wrapped)]
    return lines


def _next(status: Status, page: Page) -> list[str]:
    degraded = status.state == "ready" and status.degraded
    hints = NEXT_DEGRADED if degraded else NEXT.get(status.state, ())
    if degraded and not any(attempt.outcome in FAILURES for attempt in status.attempts):
        hints = NEXT_DEGRADED[1:]  # it began on this rung: what led to it was in an earlier life of the daemon
    if not hints:
        return []
    width = max(len(command) for command, _ in hints)
    return ["", *(page.paint(f"  {command:<{width}}   {why}", dim=True) for command, why in hints)]


def attempts_lines(attempts: Sequence[AttemptStatus], page: Page) -> list[str]:
    if not attempts:
        return ["no attempt yet"]
    rows = [("ATTEMPT", "RUNG", "OUTCOME", "PHASE", "LASTED", "ENDED")]
    for attempt in attempts:
        ended = "" if attempt.ended_ago_s is None else f"{span(attempt.ended_ago_s)} ago"
        lasted = span(attempt.duration_s)
        rows.append((str(attempt.number), attempt.rung, attempt.outcome, attempt.phase, lasted, ended))
    head, *table = columns(rows)
    lines = [page.paint(head, bold=True)]
    for attempt, row in zip(attempts, table, strict=True):
        lines += [page.paint(row, "red") if attempt.outcome in FAILURES else row]
        lines += _diagnosis(attempt, page, indent=9)
        lines += [f"{' ' * 9}{page.paint('| ' + plain(evidence), dim=True)}" for evidence in attempt.evidence]
    return lines


def ladder_lines(rungs: Sequence[RungStatus], page: Page) -> list[str]:
    rows = [("", "RUNG", "STANDING", "CHANGES")]
    current: list[bool] = []
    for number, rung in enumerate(rungs, start=1):
        changes = rung.changes or ("the settings as configured",)
        cells = [(str(number), rung.name, rung.standing, changes[0]), *(("", "", "", more) for more in changes[1:])]
        cells += [("", "", "", f"costs: {rung.cost}")] if rung.cost else []
        rows += cells
        current += [rung.standing == "current"] * len(cells)
    head, *table = columns(rows)
    return [
        page.paint(head, bold=True),
        *(page.paint(row, bold=True) if now else row for row, now in zip(table, current, strict=True)),
    ]


def _field(label: str, values: Sequence[str]) -> list[str]:
    """systemctl's way: labels end at one column, further values stand below the first; no value, no line."""
    return [f"{label if n == 0 else '':>{LABEL}}{':' if n == 0 else ' '} {value}" for n, value in enumerate(values)]


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
