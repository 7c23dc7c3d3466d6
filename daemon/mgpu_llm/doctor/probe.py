"""The GPUs at work: each alone, in pairs, and all over NCCL, as the load would use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from mgpu_llm.adapters.gpus import GpuReading
from mgpu_llm.core import transports
from mgpu_llm.core.preflight import Checked
from mgpu_llm.doctor.finding import Finding, Subject, gib

SUBJECT: Final = Subject("probe")
NAME: Final = "probe-gpus"
#: For all of it, its end included; `mgpuctl doctor` waits longer.
DEADLINE_S: Final = 180.0
#: What an engine that runs holds at least on each of its GPUs.
BUSY_BYTES: Final = 1 << 30


def busy(readings: Iterable[GpuReading]) -> Finding | None:
    """Why GPUs are better left alone; None where nobody uses them."""
    used = [
        f"GPU {reading.index} ({gib(reading.memory_used_bytes)} taken)"
        for reading in readings
        if reading.processes or reading.memory_used_bytes > BUSY_BYTES
    ]
    if not used:
        return None
    why = f"in use: {', '.join(used)}; the probe would disturb what runs there, and be disturbed"
    return SUBJECT.unknown(NAME, why, "mgpuctl stop, then again; or --force to probe nevertheless")


def findings(checked: Checked, gpus: tuple[str, ...]) -> Iterator[Finding]:
    """`gpus` are those of the ranks."""
    found = transports.judge(checked, gpus)
    told = list(transports.in_words(checked))
    if found is not None:
        cures = [each.name for each in checked.transports[1:] if each.works]
        works = f"mgpud will come to it by itself: {cures[0]} works; " if cures else ""
        yield SUBJECT.problem(NAME, found.summary, f"{works}{found.advice}" if found.advice else works.rstrip("; "))
    elif checked.unobserved:
        yield SUBJECT.unknown(NAME, checked.unobserved)
    elif not checked.transports and len(gpus) > 1:
        yield SUBJECT.unknown(NAME, "the probe has told nothing of how the GPUs reach each other")
    elif any(each.works is None for each in checked.transports[:1]):
        yield SUBJECT.unknown(NAME, f"{'; '.join(told)}")
    else:
        seen = "; ".join(told) or f"GPU {gpus[0]} computes"
        yield SUBJECT.ok(NAME, f"{seen} ({checked.took_s:.0f} s)")
