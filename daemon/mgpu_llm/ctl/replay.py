"""mgpuctl replay: judge a recorded start as the daemon would have. Asks no daemon, and needs neither root nor a GPU."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import click

from mgpu_llm.core import recording, replay
from mgpu_llm.core.recording import Recording, RecordingError
from mgpu_llm.core.replay import Report
from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Failure
from mgpu_llm.ctl.words import Page, columns, page, plain, span

GZIP = b"\x1f\x8b"
#: The longest row of ours, with the stacks of many processes, has some hundred kilobytes; a file without line ends is none.
LONGEST_ROW = 16 << 20
#: Recordings end at 64 MiB; this is room for other recorders, and bounds what a small gzipped file can become.
MOST_BYTES = 256 << 20
COLOURS = {"healthy": "green", "stalled": "red", "crashed": "red", "averted": "red", "running": "yellow"}
LABEL = 13


@click.command("replay")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(file: Path, *, as_json: bool) -> int:
    """Judge a recorded start as the daemon would have.

    FILE is a recording, gzipped or not: the daemon keeps them in records/ of its state folder. Exits with 0 whatever the
    verdict is, and with 2 if FILE is no recording.
    """
    try:
        recorded, remark = _read(file)
        report = replay.judge(recorded)
    except RecordingError as error:
        raise Failure(f"cannot replay '{file}': {error}", exits.NO_RECORDING) from error
    if remark:
        click.echo(f"mgpuctl: '{file}' {remark}", err=True)
    if as_json:
        click.echo(json.dumps(replay.to_json(report), indent=2))
    else:
        click.echo("\n".join(report_lines(report, page())))
    return exits.DONE


def _read(file: Path) -> tuple[Recording, str]:
    """The recording, and what is to be said of it: a file whose writer was killed is read as far as it goes. Raises
    RecordingError."""
    cut = list[EOFError]()
    try:
        with file.open("rb") as raw, _unpacked(raw) as lines:
            found = recording.read(_lines(lines, cut))
    except OSError as error:
        raise RecordingError(error.strerror or str(error)) from error
    except RecordingError as error:
        if cut:
            raise RecordingError("it is cut off before its first row") from error
        raise
    return found, f"is cut off; judged up to {found.ended_at:.1f} s" if cut else ""


@contextmanager
def _unpacked(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    packed = raw.read(2) == GZIP
    raw.seek(0)
    if not packed:
        yield raw
        return
    with gzip.open(raw) as unpacked:
        yield cast("IO[bytes]", unpacked)


def _lines(lines: IO[bytes], cut: list[EOFError]) -> Iterator[bytes]:
    """The lines; of a gzipped file that was cut off those that are whole, and the error goes into `cut`."""
    left = MOST_BYTES
    try:
        while line := lines.readline(min(LONGEST_ROW, left) + 1):
            left -= len(line)
            if left < 0:
                raise RecordingError("it is larger than any recording")
            if len(line) > LONGEST_ROW:
                raise RecordingError("it has a line longer than any of a recording")
            yield line
    except EOFError as error:
        cut.append(error)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RecordingError(f"it is damaged: {error}") from error


def report_lines(report: Report, page: Page) -> list[str]:
    """The report as people read it."""
    verdict = report.outcome
    if report.verdict_at is not None:
        since = report.verdict_at - report.last_progress_at
        verdict += f" at {report.verdict_at:.1f} s, {since:.1f} s after the last progress"
    elif report.outcome == "healthy":
        verdict += f" at {report.ended_at:.1f} s"
    fields = [
        ("Outcome", page.paint(verdict, COLOURS[report.outcome], bold=True)),
        ("Last progress", f"{report.last_progress_at:.1f} s, in {report.phase}"),
        ("Cause", report.cause or ""),
        ("What", report.summary),
        ("To do", report.advice),
        ("Decision", report.decision or ""),
    ]
    lines = list[str]()
    for label, text in fields:
        wrapped = [text] if label == "Outcome" else page.wrap(text, LABEL + 2)
        lines += [
            f"{label if n == 0 else '':>{LABEL}}{':' if n == 0 else ' '} {part}" for n, part in enumerate(wrapped)
        ]
    lines += ["", *_phases(report, page), *_suspicions(report)]
    if report.evidence:
        lines += ["", page.paint("Evidence:", bold=True), *(f"  {plain(seen)}" for seen in report.evidence)]
    return lines


def _phases(report: Report, page: Page) -> list[str]:
    rows = [("PHASE", "BEGAN", "TOOK", "LONGEST QUIET", "PATIENCE")]
    rows += [
        (
            phase.name,
            f"{phase.began_s:.1f} s",
            span(phase.took_s),
            f"{phase.longest_quiet_s:.1f} s",
            span(phase.patience_s),
        )
        for phase in report.phases
    ]
    head, *table = columns(rows)
    return [page.paint(head, bold=True), *table]


def _suspicions(report: Report) -> list[str]:
    lines = [
        f"  at {found.at_s:.1f} s in {found.phase}: "
        + (
            "confirmed"
            if found.cleared_s is None
            else f"cleared {found.cleared_s - found.at_s:.1f} s later, {found.why}"
        )
        for found in report.suspicions
    ]
    return ["", "Suspected:", *lines] if lines else []
