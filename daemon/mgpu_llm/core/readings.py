"""The readings in a recording's rows: a process, a GPU, a thread's stack and a check of the GPUs as JSON, and back.
docs/recordings.md has the fields."""

from __future__ import annotations

from typing import Any

from mgpu_llm.core.events import GpuSample, ProcessSample, Stack
from mgpu_llm.core.preflight import Checked, Transport

Row = dict[str, Any]


def process(row: Row) -> ProcessSample:
    return ProcessSample(
        pid=integer(row["pid"]),
        started=integer(row.get("start", 0)),
        name=str(row.get("name", "")),
        state=str(row.get("st", "")),
        cpu_s=float(row.get("cpu", 0.0)),
        major_faults=integer(row.get("majflt", 0)),
        rss_bytes=integer(row.get("rss", 0)),
        read_chars=count(row.get("rchar")),
        read_bytes=count(row.get("rbytes")),
        written_bytes=count(row.get("wbytes")),
    )


def process_row(sample: ProcessSample) -> Row:
    row = {
        "pid": sample.pid,
        "start": sample.started,
        "name": sample.name,
        "st": sample.state,
        "cpu": round(sample.cpu_s, 2),
        "majflt": sample.major_faults,
        "rss": sample.rss_bytes,
    }
    io = {"rchar": sample.read_chars, "rbytes": sample.read_bytes, "wbytes": sample.written_bytes}
    return {**row, **{name: value for name, value in io.items() if value is not None}}


def gpu(index: int, row: Row) -> GpuSample:
    processes = row.get("procs")
    return GpuSample(
        uuid=str(row.get("uuid", f"GPU-{index}")),
        used_bytes=integer(row["mem"]),
        total_bytes=count(row.get("total")),
        utilisation_percent=count(row.get("util")),
        power_mw=count(row.get("mw")),
        # Some recorders write the driver's refusal in the place of the list.
        processes=tuple((integer(pid), count(held)) for pid, held in processes)
        if isinstance(processes, list)
        else None,
    )


def gpu_row(sample: GpuSample) -> Row:
    row = {
        "uuid": sample.uuid,
        "mem": sample.used_bytes,
        "total": sample.total_bytes,
        "util": sample.utilisation_percent,
        "mw": sample.power_mw,
        "procs": None if sample.processes is None else [list(process) for process in sample.processes],
    }
    return {name: value for name, value in row.items() if value is not None}


def stack(row: Row) -> Stack:
    return Stack(
        pid=integer(row["pid"]),
        thread=integer(row["tid"] if "tid" in row else row["pid"]),
        process=str(row.get("process", "")),
        name=str(row.get("thread", "")),
        state=str(row.get("st", "")),
        frames=tuple(map(str, row.get("frames") or ())),
        waits_in=str(row.get("wchan", "")),
    )


def stack_row(thread: Stack) -> Row:
    return {
        "pid": thread.pid,
        "tid": thread.thread,
        "process": thread.process,
        "thread": thread.name,
        "st": thread.state,
        "frames": list(thread.frames),
        "wchan": thread.waits_in,
    }


def checked(row: Row) -> Checked:
    return Checked(
        transports=tuple(map(_transport, row.get("transports", ()))),
        gpus={_named(gpu): str(told) for gpu, told in row.get("gpus", {}).items()},
        pairs={(_named(one), _named(other)): str(told) for one, other, told in row.get("pairs", ())},
        took_s=float(row.get("took", 0.0)),
        remembered=bool(row.get("remembered", False)),
        unobserved=str(row.get("unobserved", "")),
    )


def checked_row(found: Checked) -> Row:
    return {
        "transports": [_transport_row(transport) for transport in found.transports],
        "gpus": dict(found.gpus),
        "pairs": [[*pair, told] for pair, told in found.pairs.items()],
        "took": round(found.took_s, 2),
        "remembered": found.remembered,
        "unobserved": found.unobserved,
    }


def _named(gpu: Any) -> str:
    """Raises ValueError where it is no name."""
    if not (name := str(gpu).strip()):
        raise ValueError("a GPU has no name")
    return name


def _transport(row: Row) -> Transport:
    works = row.get("works")
    return Transport(
        name=str(row["name"]),
        works=None if works is None else bool(works),
        gib_per_s=number(row.get("speed")),
        took_s=float(row.get("took", 0.0)),
        detail=str(row.get("detail", "")),
    )


def _transport_row(transport: Transport) -> Row:
    return {
        "name": transport.name,
        "works": transport.works,
        "speed": transport.gib_per_s,
        "took": round(transport.took_s, 2),
        "detail": transport.detail,
    }


def integer(value: Any) -> int:
    """Raises ValueError and the like where it is none that a kernel or a driver would tell."""
    found = int(value)
    if abs(found) >= 1 << 63:
        raise ValueError("it has more than 64 bits")
    return found


def count(value: Any) -> int | None:
    return None if value is None else integer(value)


def number(value: Any) -> float | None:
    return None if value is None else float(value)
