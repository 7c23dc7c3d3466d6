"""The name of what is kept of a failed attempt, and the document that tells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from mgpu_llm.core import redaction
from mgpu_llm.core.effects import KeepIncident

#: "20261124T210500Z-a3-stalled-in-weights": when by the clock of then, which attempt, why.
ID: Final = re.compile(r"\d{8}T\d{6}Z-a\d{1,9}-[a-z0-9-]{1,64}")
FORMAT: Final = 1
#: What a list of incidents tells of each, beside its id.
SHORT: Final = ("at", "attempt", "rung", "phase", "outcome", "cause", "summary", "decision")
#: Variables whose values bear on how a model loads; of all others an incident has the names alone.
TOLD: Final = re.compile(
    r"(?:CUDA|NCCL|NVIDIA|VLLM|HF|HUGGINGFACE|TRANSFORMERS|SAFETENSORS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|FLASHINFER|OMP|MKL"
    r"|GLOO|UCX|RAY|MGPU_LLM|PYTHON\w*|XDG|LC)_\w+|PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON\w+|HOME|TMPDIR|LANG|TZ|USER"
    r"|VIRTUAL_ENV|(?:https?|all|no)_proxy",
    re.IGNORECASE,
)
_VLLM: Final = re.compile(r"vLLM API server version (?P<a>\d\S*)|Initializing a V\d LLM engine \(v(?P<b>[^)\s]+)\)")
_NCCL: Final = re.compile(r"vLLM is using nccl==(?P<a>\d\S*)")


def name(utc_s: float, attempt: int, cause: str) -> str:
    """The incident's id; `utc_s` are seconds since 1970."""
    word = re.sub(r"[^a-z0-9-]", "-", cause.lower())[:64] or "unknown"
    return f"{datetime.fromtimestamp(utc_s, UTC):%Y%m%dT%H%M%SZ}-a{attempt}-{word}"


def document(
    keep: KeepIncident,
    *,
    argv: Iterable[str],
    environment: Mapping[str, str],
    versions: Mapping[str, str],
    sources: Mapping[str, str],
    more: Mapping[str, object],
) -> dict[str, Any]:
    """incident.json, before secrets are taken out. `sources` says of each source "" or why it is not observed; `more` are
    times and names that only the outside knows."""
    told = asdict(keep)
    launch = told.pop("launch")
    told["id"] = told.pop("incident")
    shown = {name: value for name, value in environment.items() if name in keep.launch.env or TOLD.fullmatch(name)}
    return {
        "format": FORMAT,
        **told,
        **more,
        "launch": {
            "argv": redaction.argv(list(argv)),
            "environment": redaction.environment(shown),
            "other_variables": sorted(set(environment) - set(shown)),
            "gpus": launch["gpus"],
        },
        "versions": dict(versions),
        "not_observed": {source: why for source, why in sources.items() if why},
    }


def versions_in(lines: Iterable[str]) -> dict[str, str]:
    """What the engine's own words say of its version and NCCL's; without a key where they do not."""
    found = dict[str, str]()
    for line in lines:
        for what, pattern in (("vllm", _VLLM), ("nccl", _NCCL)):
            if (match := pattern.search(line)) is not None:
                found.setdefault(what, next(group for group in match.groups() if group))
    return found
