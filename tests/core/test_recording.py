"""Recordings: events as rows and back, and rows that other tools wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import get_args

import pytest

from mgpu_llm.core import recording
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineEvent,
    EngineExited,
    EngineGone,
    EngineSpawned,
    EngineSpawnFailed,
    EngineStuck,
    Event,
    GpuSample,
    GpusSampled,
    GpusUnobserved,
    GpuUnfit,
    HealthProbed,
    HostSampled,
    IncidentKept,
    KernelSaid,
    LineRead,
    LinesDropped,
    Preflighted,
    ProcessesSampled,
    ProcessSample,
    Stack,
    StacksTaken,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.preflight import Checked, Transport
from mgpu_llm.core.recording import RecordingError, Row, of_row, to_row
from mgpu_llm.core.xid import Action

WHOLE_PROCESS = ProcessSample(
    pid=71, started=123456, name="VLLM::Worker_TP", state="R", cpu_s=20.25, major_faults=3, rss_bytes=1 << 31,
    read_chars=1 << 40, read_bytes=5, written_bytes=0,
)  # fmt: skip
BARE_PROCESS = ProcessSample(pid=1, started=0, name="", state="", cpu_s=0.0, major_faults=0, rss_bytes=0)
WHOLE_GPU = GpuSample(
    uuid="GPU-a",
    used_bytes=5,
    total_bytes=1 << 37,
    utilisation_percent=100,
    power_mw=124_000,
    processes=((71, 5), (72, None)),
)
BARE_GPU = GpuSample(uuid="GPU-b", used_bytes=0)
WHOLE_STACK = Stack(
    pid=71, thread=72, process="VLLM::Worker_TP", name="MainThread", state="D", frames=("f (x.py:1)", "g (y.py:2)"),
    waits_in="folio_wait_bit",
)  # fmt: skip
BARE_STACK = Stack(pid=71, thread=71, process="")
#: Every kind of event that is recorded, full and bare.
WHOLE_CHECK = Checked(
    transports=(
        Transport(name="as-launched", works=False, took_s=5.25, detail="hung for 5 s in an all-reduce"),
        Transport(name="nvlink-gentle"),
        Transport(name="p2p-off", works=True, gib_per_s=25.5, took_s=1.5),
    ),
    gpus={"3": "out of order"},
    pairs={("0", "1"): "copies arrive wrong"},
    took_s=9.5,
    remembered=True,
    unobserved="it was cut short",
)
RECORDED: Sequence[EngineEvent] = (
    LineRead(at=12.5, attempt=3, text="(Worker pid=71) INFO ünïcode 38%|####      | 3/8"),
    LineRead(at=12.5, attempt=3, text=""),
    LinesDropped(at=12.5, attempt=3, count=17),
    ProcessesSampled(at=12.5, attempt=3, processes=(WHOLE_PROCESS, BARE_PROCESS)),
    ProcessesSampled(at=12.5, attempt=3, processes=()),
    GpusSampled(at=12.5, attempt=3, gpus=(WHOLE_GPU, BARE_GPU)),
    GpusSampled(at=12.5, attempt=3, gpus=(GpuSample(uuid="GPU-a", used_bytes=1, processes=()),)),
    GpusSampled(at=12.5, attempt=3, gpus=()),
    GpusUnobserved(at=12.5, attempt=3, reason="NVML did not answer in 2 s"),
    HostSampled(at=12.5, attempt=3, memory_percent=12.25, storage_percent=0.0),
    HostSampled(at=12.5, attempt=3),
    KernelSaid(at=12.5, attempt=3, text="NVRM: Xid (PCI:0000:17:00): 79, GPU has fallen off the bus."),
    KernelSaid(at=12.5, attempt=3, text="", elsewhere=True),
    KernelSaid(at=12.5, attempt=3, text="NVRM: Xid (PCI:0000:17:00): 45, pid=71", gpus=("1", "GPU-a")),
    GpuUnfit(at=12.5, attempt=3, gpu="1", what="GPU is lost (NVML error 15)", action=Action.LOST),
    StacksTaken(at=12.5, attempt=3, stacks=(WHOLE_STACK, BARE_STACK), unobserved="no ptrace of 71"),
    StacksTaken(at=12.5, attempt=3, stacks=()),
    Preflighted(at=12.5, attempt=3, checked=Checked()),
    Preflighted(at=12.5, attempt=3, checked=WHOLE_CHECK),
)
NOT_RECORDED: Sequence[Event] = (
    StartRequested(at=12.5),
    StopRequested(at=12.5, final=True, by="x"),
    Ticked(at=12.5),
    EngineSpawned(at=12.5, attempt=3, pid=1),
    EngineSpawnFailed(at=12.5, attempt=3, reason="x", hopeless=False),
    EngineExited(at=12.5, attempt=3, status=1),
    EngineGone(at=12.5, attempt=3),
    EngineStuck(at=12.5, attempt=3, holders=()),
    IncidentKept(at=12.5, attempt=3, incident="20261124T210500Z-a3-engine-exited"),
    HealthProbed(at=12.5, attempt=3, healthy=True, detail="200"),
    CompletionProbed(at=12.5, attempt=3, served=True, detail="200"),
)


def told(row: Row) -> list[Event]:
    return list(of_row({"t": 1.0, **row}, attempt=1, spawned_at=10.0))


# -- rows and events -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", RECORDED, ids=lambda event: type(event).__name__)
def test_an_event_that_is_recorded_comes_back_as_it_was(event: EngineEvent) -> None:
    row = to_row(event, spawned_at=10.0)
    assert row is not None
    assert row["t"] == 2.5
    assert list(of_row(json.loads(json.dumps(row)), attempt=3, spawned_at=10.0)) == [event]


@pytest.mark.parametrize("event", NOT_RECORDED, ids=lambda event: type(event).__name__)
def test_what_is_judged_by_nobody_is_not_recorded(event: Event) -> None:
    assert to_row(event, spawned_at=10.0) is None


def test_every_event_of_an_engine_is_tried_here() -> None:
    assert {type(event) for event in (*RECORDED, *NOT_RECORDED)} >= set(get_args(EngineEvent))


def test_a_row_without_anything_to_tell_is_no_event() -> None:
    for row in ({"kind": "weather"}, {"kind": "note", "what": "fault"}, {"kind": "sample"}, {}):
        assert told(row) == []


def test_lists_that_are_both_there_and_empty_were_not_looked_at_and_one_alone_was() -> None:
    assert told({"kind": "sample", "gpus": [], "procs": []}) == []
    assert told({"kind": "sample", "gpus": None, "procs": None}) == []
    assert told({"kind": "sample", "procs": []}) == [ProcessesSampled(at=11.0, attempt=1, processes=())]
    assert told({"kind": "sample", "gpus": []}) == [GpusSampled(at=11.0, attempt=1, gpus=())]
    both = told({"kind": "sample", "gpus": [{"mem": 1}], "procs": [{"pid": 4}]})
    assert [type(event) for event in both] == [ProcessesSampled, GpusSampled]


def test_fields_that_are_missing_are_not_observed() -> None:
    (processes,) = told({"kind": "sample", "procs": [{"pid": 4}], "gpus": None})
    assert processes == ProcessesSampled(at=11.0, attempt=1, processes=(
        ProcessSample(pid=4, started=0, name="", state="", cpu_s=0.0, major_faults=0, rss_bytes=0),
    ))  # fmt: skip
    (gpus,) = told({"kind": "sample", "gpus": [{"util": 3}, {"mem": 644939776}]})
    assert gpus == GpusSampled(at=11.0, attempt=1, gpus=(GpuSample(uuid="GPU-0", used_bytes=644939776),))
    assert told({"kind": "sample", "gpus": [{"util": 3}]}) == []
    assert told({"kind": "log"}) == [LineRead(at=11.0, attempt=1, text="")]
    assert told({"kind": "dropped"}) == [LinesDropped(at=11.0, attempt=1, count=0)]
    assert told({"kind": "unobserved"}) == [GpusUnobserved(at=11.0, attempt=1, reason="")]
    assert told({"kind": "host"}) == [HostSampled(at=11.0, attempt=1)]
    assert told({"kind": "kernel"}) == [KernelSaid(at=11.0, attempt=1, text="")]
    assert told({"kind": "stacks"}) == [StacksTaken(at=11.0, attempt=1, stacks=())]
    assert told({"kind": "stacks", "stacks": [{"pid": 4}]}) == [
        StacksTaken(at=11.0, attempt=1, stacks=(Stack(pid=4, thread=4, process=""),))
    ]


def test_what_the_driver_refused_to_tell_about_a_gpus_processes_is_not_observed() -> None:
    (seen,) = told({"kind": "sample", "gpus": [{"mem": 1, "procs": "Insufficient Permissions"}]})
    assert isinstance(seen, GpusSampled)
    assert seen.gpus[0].processes is None


def test_colours_are_taken_out_of_lines() -> None:
    assert told({"kind": "log", "line": "\x1b[1;36m(Worker pid=1)\x1b[0;0m x"}) == [
        LineRead(at=11.0, attempt=1, text="(Worker pid=1) x")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "dropped", "count": "many"},
        {"kind": "dropped", "count": float("inf")},
        {"kind": "sample", "procs": [{}]},
        {"kind": "sample", "procs": 5},
        {"kind": "sample", "procs": ["x"]},
        {"kind": "sample", "procs": [{"pid": 4, "cpu": "x"}]},
        {"kind": "sample", "procs": [{"pid": 4, "rss": None}]},
        {"kind": "sample", "procs": [{"pid": 4, "rss": float("inf")}]},
        {"kind": "sample", "procs": [{"pid": 4, "rss": float("nan")}]},
        {"kind": "sample", "procs": [{"pid": 4, "rss": 1 << 63}]},
        {"kind": "sample", "procs": [{"pid": -(10**400)}]},
        {"kind": "sample", "gpus": [{"mem": "x"}]},
        {"kind": "sample", "gpus": [5]},
        {"kind": "sample", "gpus": [{"mem": 1, "procs": [[1]]}]},
        {"kind": "sample", "gpus": [{"mem": 1, "procs": [1]}]},
        {"kind": "host", "mem": "x"},
        {"kind": "host", "mem": 10**400},
        {"kind": "stacks", "stacks": [{}]},
        {"kind": "stacks", "stacks": ["x"]},
        {"kind": "stacks", "stacks": [{"pid": 1, "frames": 5}]},
    ],
)
def test_a_field_of_a_wrong_type_is_refused_with_its_row(row: Row) -> None:
    with pytest.raises(RecordingError) as refused:
        told(row)
    assert str(refused.value).startswith(f"the {row['kind']} row at t=1.0 has a field of a wrong type: ")
    assert "\n" not in str(refused.value)


def test_a_note_has_its_time_its_word_and_more() -> None:
    assert recording.note(1.23456789, "exit", rc=3) == {"t": 1.234568, "kind": "note", "what": "exit", "rc": 3}
