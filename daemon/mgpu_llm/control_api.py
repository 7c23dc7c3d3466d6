"""The control socket's words, used by both ends: HTTP over a Unix socket, JSON in and out.

GET  /v1/status    Status                       GET  /v1/ladder    {"rungs": [RungStatus]}
GET  /v1/logs?lines=N   {"lines": [str]}        POST /v1/start|stop|restart|forget   {"accepted": true, "message": str}
POST /v1/reload    {"applied": [key], "needs_restart": [key]}, keys as "patience.weights"; status 422: the config is wrong,
                   nothing has changed, and {"error": str, "problems": [str]} has a line for each problem
GET  /v1/plan?cause=CAUSE   {"cause": str, "plans": [...]}, as `mgpud --plan CAUSE` has it, and "begins": {"rung", "since"}
                   of what the next start begins with, or null; status 400: no such cause
GET  /v1/gpus      the GPUs of the host and who uses them, as gpu_json has it; status 409: the driver does not answer
GET  /v1/incidents {"incidents": [{"id": str, ...}]}, oldest first
GET  /v1/incidents/ID   incident.json, "folder" and "files" with it; ID may be the beginning of one, or "last"
GET  /v1/incidents/ID/archive   a .tar.gz of it
Errors: {"error": str} with status 4xx or 5xx.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict
from typing import Any

from mgpu_llm.core import instances
from mgpu_llm.core.status import AttemptStatus, Count, Degradation, GpuStatus, PhaseStatus, RungStatus, Status

DEFAULT_RUNTIME_DIR = str(instances.runtime_dir(""))
DEFAULT_STATE_DIR = str(instances.state_dir(""))
SOCKET_NAME = instances.SOCKET
STATUS = "/v1/status"
LADDER = "/v1/ladder"
PLAN = "/v1/plan"
LOGS = "/v1/logs"
GPUS = "/v1/gpus"
INCIDENTS = "/v1/incidents"
#: The most lines of the engine that one request may ask for.
MOST_LINES = 10_000
#: The cause that stands for all that nobody knows. It is core/planning's, where it comes with the whole table of causes.
UNKNOWN_CAUSE = "unknown"
#: Below the state folder: the rung that served last, of which `forget` speaks.
KNOWN_GOOD_NAME = "known-good.json"
VERBS = ("start", "stop", "restart", "forget")
RELOAD = "reload"


def status_to_json(status: Status) -> dict[str, Any]:
    return asdict(status)


def status_from_json(document: dict[str, Any]) -> Status:
    """Inverse of `status_to_json`. Keys that this version does not know are left out, so that a newer daemon can be
    asked by an older mgpuctl; keys that an older daemon does not know take their defaults. Any other missing key raises
    KeyError or TypeError."""
    fields = Status.__dataclass_fields__
    known = {key: document[key] for key in fields if key in document or fields[key].default is MISSING}
    known["changes"] = tuple(known["changes"])
    known["shards"] = _count(known["shards"])
    known["graphs"] = _count(known["graphs"])
    known["gpus"] = tuple(GpuStatus(**_only(GpuStatus, gpu)) for gpu in known["gpus"])
    known["attempts"] = tuple(_attempt(attempt) for attempt in known["attempts"])
    known["phases"] = tuple(PhaseStatus(**_only(PhaseStatus, phase)) for phase in known.get("phases", ()))
    known["gpus_out"] = tuple(known.get("gpus_out", ()))
    known["gpu_faults"] = tuple(known.get("gpu_faults", ()))
    known["degradation"] = _degradation(known.get("degradation"))
    return Status(**known)


def rung_to_json(rung: RungStatus) -> dict[str, Any]:
    return asdict(rung)


def rung_from_json(document: dict[str, Any]) -> RungStatus:
    known = _only(RungStatus, document)
    return RungStatus(**{**known, "changes": tuple(known["changes"])})


def _count(document: dict[str, int] | None) -> Count | None:
    return None if document is None else Count(done=document["done"], total=document["total"])


def _degradation(document: dict[str, Any] | None) -> Degradation | None:
    if document is None:
        return None
    known = _only(Degradation, document)
    return Degradation(**{**known, "changes": tuple(known["changes"])})


def _attempt(document: dict[str, Any]) -> AttemptStatus:
    known = _only(AttemptStatus, document)
    return AttemptStatus(**{**known, "evidence": tuple(known["evidence"])})


def _only(shape: type[Any], document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in shape.__dataclass_fields__ if key in document}
