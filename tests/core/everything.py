"""A representative of every state and every event, and the rules that hold for each pair of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from mgpu_llm import control_api
from mgpu_llm.core import report, suspicion
from mgpu_llm.core.diagnosis import Clue, Diagnosis
from mgpu_llm.core.effects import BeginPreflight, Effect, Exit, KeepIncident, KillEngine, NotifyReady, SpawnEngine
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineEvent,
    EngineExited,
    EngineGone,
    EngineSpawned,
    EngineSpawnFailed,
    EngineStuck,
    Event,
    ForgetRequested,
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
    RestartRequested,
    StacksTaken,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.known_good import KnownGood
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked, Transport
from mgpu_llm.core.progress import begin
from mgpu_llm.core.states import (
    LONGEST_HISTORY,
    Anew,
    Backoff,
    Checking,
    Ended,
    Fail,
    Failed,
    Killing,
    Ready,
    Rest,
    Run,
    Starting,
    State,
    Stopped,
    Terminating,
    Try,
)
from mgpu_llm.core.suspicion import Suspicion
from mgpu_llm.core.xid import Action
from tests.core.looks import stack
from tests.core.world import (
    BAD_FLAG,
    BANNER,
    NCCL,
    NOT_FREE,
    OUT_OF_MEMORY,
    P2P_OFF,
    UP,
    WORLD_SIZE,
    gpu,
    loading,
    policy,
    rungs,
    worker,
)

POLICY = policy()
NOW = 5000.0
IDENTITY = report.Identity(version="0.1.0", model="m", url="http://127.0.0.1:8000")
FAILURE = Diagnosis(cause="engine-exited", outcome="crashed", summary="it ended", advice="look", evidence=("e",))
HISTORY = tuple(
    Ended(number=n, rung=BASE, outcome="crashed", phase="boot", ended_at=10.0 * n, duration_s=9.0, diagnosis=FAILURE)
    for n in range(1, 4)
)
KNOWN = KnownGood(rung="p2p-off", since="2026-11-24T21:05:00Z", cause="nccl-p2p", boot="b")
RUN = Run(attempt=4, rung=P2P_OFF, tries=3, deaths=2, ended=HISTORY, known=KNOWN)
LAST_RUN = replace(RUN, rung=rungs(POLICY)[-1], tries=POLICY.attempts)
TRIAL = Run(attempt=4, tries=1, ended=HISTORY, known=KNOWN, trial=P2P_OFF)
LOADED = loading().state
BROKEN = Transport(name=AS_LAUNCHED, works=False, detail="hung for 5 s in an all-reduce")
CHECKS = (
    Checked(transports=(Transport(name=AS_LAUNCHED, works=True, gib_per_s=255.0),), took_s=5.0),
    Checked(transports=(BROKEN, Transport(name="p2p-off", works=True))),
    Checked(transports=(BROKEN, Transport(name="p2p-off", works=False))),
    Checked(gpus={"GPU-a": "no CUDA context: error 999"}),
    Checked(pairs={("GPU-a", "GPU-b"): "1 of 1024 words is another"}),
    Checked(unobserved="there is no torch"),
    Checked(),
)


def _suspicions() -> Iterator[Suspicion]:
    look = StacksTaken(at=NOW - 3, attempt=RUN.attempt, stacks=(stack(),))
    yield Suspicion(since=NOW - 5)
    yield Suspicion(since=NOW - 5, asked_at_s=5.0)
    yield Suspicion(since=NOW - 50, asked_at_s=0.0)
    yield Suspicion(since=NOW - 5, last=look, next_at=NOW - 1)
    yield Suspicion(since=NOW - 5, last=look, asked_at_s=5.0)
    yield suspicion.raised(NOW - 5, may_look=False)


def _states() -> Iterator[State]:
    assert isinstance(LOADED, Starting)
    yield Stopped()
    yield Stopped(run=RUN)
    for run in (Run(attempt=4, tries=1), RUN, LAST_RUN, TRIAL):
        yield Starting(run=run, since=NOW - 9, progress=begin(NOW - 9))
        yield Starting(run=run, since=NOW - 9, progress=LOADED.progress, pid=702, clue=Clue(error="ValueError: x"))
        yield Starting(run=run, since=NOW - 9, progress=replace(LOADED.progress, quiet_s=1e6), pid=702)
        yield Starting(run=run, since=NOW - 9, progress=LOADED.progress, pid=702, probing=True)
        yield Ready(run=run, since=NOW - 5, spawned_at=NOW - 90, progress=LOADED.progress, pid=None)
        yield Ready(
            run=run, since=NOW - 5, spawned_at=NOW - 90, progress=begin(NOW), pid=702, failed_probes=2, probing=True
        )
    quiet = replace(LOADED.progress, quiet_s=POLICY.patience[LOADED.progress.phase] + 1.0)
    for doubt in _suspicions():
        yield Starting(run=RUN, since=NOW - 9, progress=quiet, pid=702, suspicion=doubt)
    for then in (
        Try(rung=rungs(POLICY)[2], delay_s=0.0),
        Try(rung=P2P_OFF, delay_s=4.0),
        Anew(),
        Rest(final=False),
        Rest(final=True),
        Fail(status=69, message="gave up"),
    ):
        yield Terminating(run=RUN, deadline=NOW + 1, then=then, why="asked")
        yield Terminating(run=RUN, deadline=NOW - 1, then=then, why="asked")
        yield Killing(run=RUN, since=NOW - 1, then=then, why="stalled")
        yield Killing(run=RUN, since=NOW - 1, then=then, why="stalled", keeping=True)
    for run in (Run(attempt=4, tries=1), RUN, LAST_RUN, TRIAL):
        yield Checking(run=run, since=NOW - 3)
        yield Starting(run=run, since=NOW - 9, progress=begin(NOW - 9), checking=True)
    for found in CHECKS:
        yield Starting(run=RUN, since=NOW - 9, progress=LOADED.progress, pid=702, checked=found)
    yield Backoff(run=RUN, rung=P2P_OFF, until=NOW + 1)
    yield Backoff(run=RUN, rung=P2P_OFF, until=NOW - 1)
    yield Failed(run=RUN, status=69, message="gave up")


def _engine_events(attempt: int) -> Iterator[Event]:
    at = NOW
    yield EngineSpawned(at=at, attempt=attempt, pid=703)
    taken = "GPU 1 has 3.1 of 80 GiB free, and utilisation 0.9 asks for more: pid 7"
    for reason, hopeless, rank in (
        ("no such file", True, None),
        ("busy", False, None),
        (taken, False, 1),
        ("", False, 1),
    ):
        yield EngineSpawnFailed(at=at, attempt=attempt, reason=reason, hopeless=hopeless, rank=rank)
    for status in (0, 1, -9, -250, 137):
        yield EngineExited(at=at, attempt=attempt, status=status)
    yield EngineGone(at=at, attempt=attempt)
    yield EngineGone(at=at, attempt=attempt, remarks=("2 files in /dev/shm could not be removed",))
    yield EngineStuck(at=at, attempt=attempt, holders=("pid 71 (VLLM::Worker, state D)",))
    yield EngineStuck(at=at, attempt=attempt, holders=())
    dirty = (("GPU-a", "it still holds 1.2 GB"),)
    yield EngineGone(at=at, attempt=attempt, dirty=dirty)
    yield EngineStuck(at=at, attempt=attempt, holders=("pid 71 (VLLM::Worker, state D)",), dirty=dirty)
    yield IncidentKept(at=at, attempt=attempt, incident=f"20261124T210500Z-a{attempt}-engine-exited")
    for text in (
        "", " ", "\x00\ufffd", "INFO", "x" * 100_000, BANNER, WORLD_SIZE, NCCL, UP, OUT_OF_MEMORY, NOT_FREE, BAD_FLAG,
        "Loading safetensors checkpoint shards:   0% Completed | 0/0 [00:00<?, ?it/s]", "{cause} {0} %s",
    ):  # fmt: skip
        yield LineRead(at=at, attempt=attempt, text=text)
    yield LinesDropped(at=at, attempt=attempt, count=7)
    yield ProcessesSampled(at=at, attempt=attempt, processes=())
    yield ProcessesSampled(at=at, attempt=attempt, processes=(worker(), worker(8, name="nvcc", state="D")))
    yield ProcessesSampled(at=at, attempt=attempt, processes=(worker(read_chars=None, read_bytes=None),))
    yield ProcessesSampled(at=at - 1e6, attempt=attempt, processes=(worker(),))
    yield GpusSampled(at=at, attempt=attempt, gpus=())
    yield GpusSampled(at=at, attempt=attempt, gpus=(gpu(), gpu("GPU-b", utilisation_percent=None)))
    yield GpusUnobserved(at=at, attempt=attempt, reason="NVML: driver not loaded")
    yield HostSampled(at=at, attempt=attempt)
    yield HostSampled(at=at, attempt=attempt, memory_percent=99.5, storage_percent=0.0)
    for said in ("", "NVRM: Xid (PCI:0000:17:00): 79, GPU has fallen off the bus.", "oom-kill:,task=x,pid=1027,uid=0"):
        for elsewhere in (True, False):
            yield KernelSaid(at=at, attempt=attempt, text=said, elsewhere=elsewhere)
            yield KernelSaid(at=at, attempt=attempt, text=said.replace("79", "119"), gpus=("GPU-a", "GPU-?"))
    for action in Action:
        yield GpuUnfit(at=at, attempt=attempt, gpu="GPU-b", what="GPU is lost", action=action)
    for seen in (
        (),
        (stack(),),
        (stack(71, state="D", waits_in="folio_wait_bit"), stack(8, "acquire (filelock/_api.py:1)")),
    ):
        for unobserved in ("", "py-spy is not installed"):
            yield StacksTaken(at=at, attempt=attempt, stacks=seen, unobserved=unobserved)
    for found in CHECKS:
        yield Preflighted(at=at, attempt=attempt, checked=found)
    for healthy in (True, False):
        yield HealthProbed(at=at, attempt=attempt, healthy=healthy, detail="")
    for served, hopeless in ((True, False), (False, False), (False, True)):
        yield CompletionProbed(at=at, attempt=attempt, served=served, detail="404", hopeless=hopeless)


def _events() -> Iterator[Event]:
    yield StartRequested(at=NOW)
    for final in (True, False):
        yield StopRequested(at=NOW, final=final, by="systemd")
    yield RestartRequested(at=NOW, by="mgpuctl")
    yield ForgetRequested(at=NOW, by="mgpuctl")
    for at in (0.0, NOW, NOW + 1e6):
        yield Ticked(at=at)
    for attempt in (RUN.attempt, 0, 1, RUN.attempt - 1, RUN.attempt + 1):
        yield from _engine_events(attempt)


STATES: Final = tuple(_states())
EVENTS: Final = tuple(_events())


def check(state: State, event: Event, after: State, effects: tuple[Effect, ...]) -> None:
    engine_exists = isinstance(state, Starting | Ready | Terminating | Killing)
    over = isinstance(event, EngineGone | EngineStuck) and event.attempt == state.run.attempt
    cleared = isinstance(state, Killing) and over and not (isinstance(event, EngineStuck) and not event.dirty)
    kinds = [type(effect) for effect in effects]
    if SpawnEngine in kinds:
        assert not engine_exists or cleared, f"{event} in {state} spawns beside a living engine"
        assert isinstance(after, Starting)
    if BeginPreflight in kinds:
        assert isinstance(after, Checking | Starting)
        assert SpawnEngine not in kinds or kinds.index(SpawnEngine) < kinds.index(BeginPreflight)
    if engine_exists and not cleared:
        assert isinstance(after, Starting | Ready | Terminating | Killing | Failed), f"{event} forgets the engine"
    if isinstance(state, Starting | Ready | Terminating) and isinstance(after, Killing):
        assert kinds.count(KillEngine) == 1
    if KeepIncident in kinds:
        assert kinds.count(KeepIncident) == 1
        assert kinds.index(KeepIncident) < kinds.index(KillEngine)
    if NotifyReady in kinds:
        assert isinstance(event, CompletionProbed)
        assert event.served
        assert isinstance(after, Ready)
    if Exit in kinds:
        assert kinds.index(Exit) == len(kinds) - 1
    if isinstance(event, EngineEvent) and event.attempt != state.run.attempt:
        assert (after, effects) == (state, ()), f"{event} of another attempt changed {state}"
    assert len(after.run.ended) <= LONGEST_HISTORY
    told = report.status(after, POLICY, NOW, IDENTITY)
    assert told.headline
    assert "\n" not in told.headline
    assert control_api.status_from_json(control_api.status_to_json(told)) == told
