"""A status for each state, as a daemon on two GPUs would give it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mgpu_llm.core.status import AttemptStatus, Count, Degradation, GpuStatus, PhaseStatus, RungStatus, Status

GPUS = (
    GpuStatus(uuid="GPU-11111111-aaaa", used_bytes=2 * 2**30, utilisation_percent=100),
    GpuStatus(uuid="GPU-22222222-bbbb", used_bytes=3 * 2**29, utilisation_percent=None),
)
STALLED = AttemptStatus(
    number=1,
    rung="base",
    outcome="stalled",
    phase="distributed-init",
    duration_s=69.2,
    ended_ago_s=130.0,
    cause="stalled-distributed-init",
    summary="both GPUs spin in the first all-reduce and nothing else moves",
    advice="check the ACS setting of the PCIe switch",
    evidence=("vLLM is using nccl==2.28.9", "GPU-11111111-aaaa: 100 % busy at 125 W"),
)
RUNNING = AttemptStatus(
    number=2,
    rung="p2p-off",
    outcome="running",
    phase="weights",
    duration_s=41.0,
    ended_ago_s=None,
    cause="",
    summary="",
    advice="",
    evidence=(),
)
STARTING = Status(
    state="starting",
    headline="loading weights, 3/8 shards (attempt 2 on rung p2p-off)",
    version="0.1.0",
    model="Qwen/Qwen2.5-72B-Instruct",
    url="http://127.0.0.1:8000",
    pid=4711,
    attempt=2,
    rung="p2p-off",
    degraded=False,
    changes=("NCCL_P2P_DISABLE=1", "--disable-custom-all-reduce"),
    cost="all-reduce runs through host memory, at a tenth of the bandwidth",
    phase="weights",
    elapsed_s=41.0,
    quiet_s=2.25,
    patience_s=20.0,
    shards=Count(done=3, total=8),
    graphs=None,
    gpus=GPUS,
    gpus_unobserved="",
    retry_in_s=None,
    processes=4,
    lines_dropped=0,
    attempts=(STALLED, RUNNING),
)
_USUAL = {
    "boot": 21.0,
    "distributed-init": 6.0,
    "weights": 540.0,
    "compile": 74.0,
    "kv-cache": 3.0,
    "warm-up": 42.0,
    "api": 1.5,
}
_TOOK = {"boot": 22.0, "distributed-init": 6.25, "weights": 203.0}
_PATIENCE = {"distributed-init": 35.0, "weights": 8.0, "compile": 120.0}
PHASES = tuple(
    PhaseStatus(
        name=name,
        standing="current" if name == "weights" else "done" if name in _TOOK else "to-come",
        took_s=_TOOK.get(name),
        usual_s=usual_s,
        percent=38.4 if name == "weights" else None,
        patience_s=_PATIENCE.get(name, 60.0),
        learnt=name == "distributed-init",
    )
    for name, usual_s in _USUAL.items()
)
EIGHT_GPUS = tuple(
    GpuStatus(
        uuid=f"GPU-{number}a2b3c4d-7d1e-4b6f-9a5c-0123456789ab",
        used_bytes=number * 2**33 + 2**30,
        utilisation_percent=100 - number,
        total_bytes=85_520_809_984,
    )
    for number in range(8)
)
#: As a daemon that knows the host tells of the first attempt: on eight GPUs, 38 % of the weights are in.
LOADING = replace(
    STARTING,
    headline="loading: weights 38 %, 230 s, attempt 1 on rung base",
    attempt=1,
    rung="base",
    changes=(),
    cost="",
    elapsed_s=230.0,
    patience_s=8.0,
    gpus=EIGHT_GPUS,
    processes=12,
    attempts=(replace(RUNNING, number=1, rung="base", duration_s=230.0),),
    phases=PHASES,
    weights_percent=38.4,
    weights_bytes_per_s=120.4e6,
    left_s=545.0,
)
SERVING = replace(
    STARTING,
    state="ready",
    headline="serving, degraded (attempt 2 on rung p2p-off)",
    degraded=True,
    phase="serving",
    quiet_s=None,
    patience_s=None,
    attempts=(STALLED, replace(RUNNING, outcome="ready", phase="serving")),
)
#: As it is told after a restart, when no failed attempt is remembered any more.
DEGRADED = replace(
    SERVING,
    headline=f"ready, degraded: rung p2p-off ({SERVING.cost}), attempt 1",
    attempt=1,
    attempts=(replace(RUNNING, number=1, outcome="ready", phase="serving"),),
    degradation=Degradation(
        since="2026-11-24T21:05:00Z",
        cause="stalled-in-distributed-init",
        changes=SERVING.changes,
        cost=SERVING.cost,
        way_back="remove the cause, then: mgpuctl forget && mgpuctl restart",
    ),
)
HEALTHY = replace(
    SERVING,
    headline="serving (attempt 1)",
    attempt=1,
    rung="base",
    degraded=False,
    changes=(),
    cost="",
    attempts=(replace(RUNNING, number=1, rung="base", outcome="ready", phase="serving"),),
)
STOPPED = replace(
    HEALTHY,
    elapsed_s=0.0,
    state="stopped",
    headline="stopped by uid 0 (root), pid 77",
    phase="boot",
    pid=None,
    processes=0,
    gpus=(),
)
TERMINATING = replace(HEALTHY, elapsed_s=0.0, state="terminating", headline="ending the engine")
KILLING = replace(HEALTHY, state="killing", headline="killing the engine")
BACKOFF = replace(
    STARTING,
    state="backoff",
    elapsed_s=0.0,
    headline="attempt 1 stalled in distributed-init; next try on rung p2p-off in 4 s",
    pid=None,
    processes=0,
    shards=None,
    retry_in_s=4.0,
    attempts=(STALLED,),
)
FAILED = replace(
    BACKOFF,
    state="failed",
    headline="gave up after 2 attempts:\n1 on base: stalled\n2 on p2p-off: out of memory",
    retry_in_s=None,
    attempts=(STALLED, replace(STALLED, number=2, rung="p2p-off", cause="cuda-out-of-memory", outcome="crashed")),
)
STATES = {status.state: status for status in (STARTING, HEALTHY, STOPPED, TERMINATING, KILLING, BACKOFF, FAILED)}
RUNGS = (
    RungStatus(name="base", changes=(), cost="", standing="tried"),
    RungStatus(name="p2p-off", changes=STARTING.changes, cost=STARTING.cost, standing="current"),
    RungStatus(name="lower-utilisation", changes=("--gpu-memory-utilization 0.9 -> 0.85",), cost="", standing="next"),
)
_ARGV = ["/opt/vllm/bin/vllm", "serve", "/models/Qwen 72B", "--tensor-parallel-size", "2", "--api-key", "s3cret"]
_BASE: dict[str, Any] = {
    "name": "base",
    "tries": 1,
    "changes": [],
    "cost": "",
    "argv": [*_ARGV, "--gpu-memory-utilization", "0.9", "--enforce-eager", "--port", "8000"],
    "env": {"CUDA_VISIBLE_DEVICES": "2,3", "HF_TOKEN": "s3cret"},
}
_P2P_OFF = {**_BASE, "name": "p2p-off", "changes": [*STARTING.changes], "cost": STARTING.cost}
_FEWER = {
    **_P2P_OFF,
    "name": "p2p-off+tp-1",
    "changes": [*STARTING.changes, "GPUs 2,3 -> 2", "--tensor-parallel-size 2 -> 1"],
    "cost": f"{STARTING.cost}; 1 of 2 GPUs do all the work",
}
_CONTEXT = {
    "what": "a shorter context",
    "why": "clients would see it, and ladder.may_change does not name it",
    "forbidden": True,
}
_OTHER = {"what": "another GPU", "why": "gpus.spares names none that is left", "forbidden": False}


_Told = tuple[str, list[dict[str, Any]], list[dict[str, Any]], int]


def _plans(cause: str, *told: _Told) -> dict[str, Any]:
    keys = ("summary", "rungs", "outs", "status")
    plans = [{"cause": cause, "wants": ["transport"], **dict(zip(keys, one, strict=True))} for one in told]
    return {"cause": cause, "plans": plans}


#: What `mgpud --plan` says of three causes: that nobody knows, that nothing helps against, and that shows in several ways.
PLANS: dict[str, dict[str, Any]] = {
    "unknown": _plans(
        "unknown", ("", [_BASE, _P2P_OFF, {**_P2P_OFF, "name": "p2p-off+eager", "tries": 2}, _FEWER], [], 69)
    ),
    "model-refused": _plans(
        "model-refused",
        ("the model's {heads} attention heads cannot be shared by so many GPUs", [_BASE], [], 65),
        ("these GPUs are too old for bfloat16", [_BASE], [], 65),
    ),
    "nccl-p2p": _plans(
        "nccl-p2p",
        ("the IOMMU stops what the GPUs write to each other", [_BASE, _P2P_OFF], [], 69),
        ("{quiet}{spins}", [{**_BASE, "tries": 2}, _FEWER], [_CONTEXT, _OTHER], 69),
        ("{quiet}, while every GPU spins", [{**_BASE, "tries": 2}, _FEWER], [_CONTEXT, _OTHER], 69),
    ),
}
