"""A load drawn for `mgpuctl status --watch`: a bar for each phase and for each GPU, in so many columns and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mgpu_llm.core.status import AttemptStatus, PhaseStatus, Status
from mgpu_llm.ctl.gpus_in_status import busy, memory, short_names, unobserved
from mgpu_llm.ctl.layout import FAILURES
from mgpu_llm.ctl.load import patience, phase_words, taken, usual
from mgpu_llm.ctl.words import Page, filled, limit, one_line, percent, span

#: Columns that stay where they are while the numbers in them grow.
NAME: Final = 16
AMOUNT: Final = 5
TIME: Final = 11
MEMORY: Final = len("120.5 of 141 GiB")
BUSY: Final = len("100 % busy")
SHORTEST: Final = 6
LONGEST: Final = 60
USUAL: Final = len("usually 59 min 59 s")
PATIENCE: Final = len("patience 59 min 59 s (learnt)")
#: From these widths on there is room for what a phase usually takes, and for its patience too.
MIDDLE: Final = 72
WIDE: Final = 120
#: A guess never says that it is all done, and the block of a phase of which nothing is known runs to and fro.
GUESS_ENDS: Final = 0.99
BLOCK: Final = 4
BLOCK_CELLS_PER_S: Final = 4
FAILURES_MOST: Final = 5


@dataclass(frozen=True, kw_only=True)
class Brush:
    """What bars are drawn with: what is done, what is only guessed to be done, and the rest."""

    done: str
    guess: str
    rest: str


UNICODE: Final = Brush(done="█", guess="▒", rest="─")
ASCII: Final = Brush(done="#", guess="=", rest=".")


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A page of `width` by `height` cells; `length` is that of every bar."""

    page: Page
    width: int
    height: int

    @property
    def brush(self) -> Brush:
        return UNICODE if self.page.unicode else ASCII

    @property
    def length(self) -> int:
        beside = NAME + 2 + 2 + AMOUNT + 2 + TIME + 2 + USUAL
        if self.width < MIDDLE:
            beside = NAME + 2 + 2 + MEMORY + 2 + BUSY
        beside += 2 + PATIENCE if self.width >= WIDE else 0
        return max(min(self.width - beside, LONGEST), SHORTEST)

    def bar(self, share: float, *, colour: str | None = "green", guessed: bool = False) -> str:
        """Filled from the left; what is not nothing shows, and what is not all leaves a rest."""
        done = round(self.length * min(max(share, 0.0), 1.0))
        done = min(max(done, int(share > 0)), self.length - int(share < 1))
        return self._painted(0, done, self.brush.guess if guessed else self.brush.done, colour)

    def pulse(self, at_s: float) -> str:
        """Something is done, and nobody knows how much of it: a block where it stands at `at_s`."""
        way = self.length - BLOCK
        step = int(at_s * BLOCK_CELLS_PER_S) % (2 * way)
        return self._painted(min(step, 2 * way - step), BLOCK, self.brush.guess, "cyan")

    def _painted(self, start: int, count: int, char: str, colour: str | None) -> str:
        rest = self.brush.rest
        parts = ((rest * start, None), (char * count, colour), (rest * (self.length - start - count), None))
        return "".join(self.page.paint(part, paint, dim=paint is None) for part, paint in parts if part)


def load_lines(status: Status, canvas: Canvas) -> list[str]:
    """The whole picture. Where there are too few lines, failed attempts give way first, then GPUs, then the blanks."""
    head = _head(status, canvas)
    phases = [_phase(phase, canvas) for phase in status.phases]
    failed = [attempt for attempt in status.attempts if attempt.outcome in FAILURES]
    room = canvas.height - len(head) - len(phases) - 1
    gpus = _at_most(_gpus(status, canvas), room - 1 - (2 if failed else 0), "more GPUs: mgpuctl status")
    room -= len(gpus) + 1 if gpus else 0
    parts = (head, phases, gpus, _failures(failed, canvas, room - 1))
    lines = [line for part in parts if part for line in ("", *part)][1:]
    return lines if len(lines) <= canvas.height else [line for line in lines if line]


def _head(status: Status, canvas: Canvas) -> list[str]:
    page, width = canvas.page, canvas.width
    alarm = "yellow" if status.suspicion or _quiet_for_long(status) else None
    words = [f"starting for {span(status.elapsed_s)}", *_quiet(status)]
    words += [f"attempt {status.attempt} on rung {status.rung}"]
    return [
        f"{page.paint(page.bullet, alarm or 'cyan')} {page.squeeze(status.model, width - 2)}",
        page.paint(page.cut(", ".join(words), width), alarm),
        page.paint(page.cut(phase_words(status), width), bold=True),
        *(page.paint(line, alarm, bold=True) for line in page.wrap(one_line(status.suspicion), 0)[:2]),
    ]


def _quiet_for_long(status: Status) -> bool:
    return status.quiet_s is not None and status.patience_s is not None and status.quiet_s > status.patience_s / 2


def _quiet(status: Status) -> list[str]:
    if status.quiet_s is None:
        return []
    return [f"quiet {span(status.quiet_s)}" + ("" if status.patience_s is None else f" of {limit(status.patience_s)}")]


def _phase(phase: PhaseStatus, canvas: Canvas) -> str:
    amount, bar = _amount_and_bar(phase, canvas)
    name = filled(canvas.page.cut(phase.name, NAME), NAME)
    more = [f"usually {usual(phase)}" if usual(phase) else ""] if canvas.width >= MIDDLE else []
    more += [f"patience {patience(phase)}"] if canvas.width >= WIDE else []
    bold = phase.standing == "current"
    paint = canvas.page.paint
    return (
        f"{paint(name, bold=bold, dim=phase.standing == 'to-come')}  {bar}"
        f"{paint(f'  {amount:>{AMOUNT}}  {taken(phase):<{TIME}}', bold=bold)}"
        f"{paint(''.join(f'  {word:<{USUAL}}' for word in more).rstrip(), dim=True)}"
    )


def _amount_and_bar(phase: PhaseStatus, canvas: Canvas) -> tuple[str, str]:
    if phase.standing == "done":
        return "", canvas.bar(0.0 if phase.took_s is None else 1.0)
    if phase.standing != "current":
        return "", canvas.bar(0.0)
    if phase.percent is not None:
        return percent(phase.percent), canvas.bar(phase.percent / 100, colour="cyan")
    if phase.usual_s and phase.took_s is not None:
        share = min(phase.took_s / phase.usual_s, GUESS_ENDS)
        return f"~{percent(100 * share)}", canvas.bar(share, colour="cyan", guessed=True)
    return "", canvas.pulse(phase.took_s or 0.0)


def _gpus(status: Status, canvas: Canvas) -> list[str]:
    lines = []
    for name, gpu in zip(short_names(status.gpus, prefix=True), status.gpus, strict=True):
        share = gpu.used_bytes / gpu.total_bytes if gpu.total_bytes else None
        bar = " " * canvas.length if share is None else canvas.bar(share, colour="blue")
        lines.append(
            f"{filled(canvas.page.cut(name, NAME), NAME)}  {bar}  {memory(gpu):>{MEMORY}}  {busy(gpu):>{BUSY}}".rstrip()
        )
    return lines + [canvas.page.cut(f"GPUs {line}", canvas.width) for line in unobserved(status)]


def _failures(failed: Sequence[AttemptStatus], canvas: Canvas, room: int) -> list[str]:
    """How many, and a line for each of the last ones."""
    if not failed:
        return []
    count = f"{len(failed)} failed attempt{'' if len(failed) == 1 else 's'}"
    shown = failed[-min(FAILURES_MOST, room - 1) :] if room > 1 else ()
    return [
        canvas.page.paint(f"{count}: mgpuctl attempts", bold=True),
        *(_failure(attempt, canvas) for attempt in shown),
    ]


def _failure(attempt: AttemptStatus, canvas: Canvas) -> str:
    how = f"{attempt.outcome} in {attempt.phase} after {span(attempt.duration_s)}"
    why = one_line(attempt.summary) or attempt.cause
    line = f"{attempt.number} on rung {attempt.rung}: {how}{': ' if why else ''}{why}"
    return "  " + canvas.page.paint(canvas.page.cut(line, canvas.width - 2), "red")


def _at_most(lines: list[str], count: int, more: str) -> list[str]:
    count = max(count, 1)
    return lines if len(lines) <= count else [*lines[: count - 1], f"{len(lines) - count + 1} {more}"]
