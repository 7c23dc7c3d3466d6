"""The names of incidents, and the document that tells one."""

from __future__ import annotations

import pytest

from mgpu_llm.core import incident
from mgpu_llm.core.effects import KeepIncident
from mgpu_llm.core.launch import Launch

KEEP = KeepIncident(
    attempt=3,
    incident="20261124T210500Z-a3-stalled-in-weights",
    rung="p2p-off",
    phase="weights",
    outcome="stalled",
    cause="stalled-in-weights",
    summary="nothing moved",
    advice="look at the disk",
    evidence=("last line: x",),
    duration_s=41.5,
    decision="step down to rung tp-1",
    launch=Launch(gpus=("2", "3"), tensor_parallel=2, utilisation=0.9, env={"MY_OWN": "7", "VLLM_API_KEY": "k"}),
)


@pytest.mark.parametrize(
    ("cause", "word"),
    [
        ("stalled-in-weights", "stalled-in-weights"),
        ("../Out of Memory", "---out-of-memory"),
        ("", "unknown"),
        ("x" * 99, "x" * 64),
    ],
)
def test_an_id_is_time_attempt_and_cause_and_always_a_plain_name(cause: str, word: str) -> None:
    name = incident.name(1_795_554_300.9, 3, cause)
    assert name == f"20261124T210500Z-a3-{word}"
    assert incident.ID.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["..", "x", "20261124T210500Z-a3-", "20261124T210500Z-a3-a/b", "20261124T210500Z-a3-A"]
)
def test_what_is_no_id_is_none(name: str) -> None:
    assert not incident.ID.fullmatch(name)


def test_the_document_tells_the_launch_without_secrets_and_of_strange_variables_the_names_alone() -> None:
    told = incident.document(
        KEEP,
        argv=("vllm", "serve", "m", "--api-key", "k"),
        environment={"MY_OWN": "7", "VLLM_API_KEY": "k", "NCCL_DEBUG": "INFO", "EDITOR": "vi"},
        versions={"kernel": "6.1"},
        sources={"stacks.txt": "", "gpus.json": "no driver"},
        more={"at": "2026-11-24T21:05:00+00:00", "recording": "r.jsonl.gz"},
    )
    assert told["launch"] == {
        "argv": ["vllm", "serve", "m", "--api-key", "..."],
        "environment": {"MY_OWN": "7", "NCCL_DEBUG": "INFO", "VLLM_API_KEY": "..."},
        "other_variables": ["EDITOR"],
        "gpus": ("2", "3"),
    }
    assert told["id"] == KEEP.incident
    assert told["not_observed"] == {"gpus.json": "no driver"}
    assert {"format", "recording", "versions", "evidence", *incident.SHORT} <= set(told)


def test_versions_are_what_the_engine_itself_has_said_first() -> None:
    lines = [
        "(APIServer pid=1) INFO [x.py:1] vLLM API server version 0.26.0",
        "INFO [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: x",
        "INFO [pynccl.py:113] vLLM is using nccl==2.28.9",
    ]
    assert incident.versions_in(lines) == {"vllm": "0.26.0", "nccl": "2.28.9"}
    assert incident.versions_in(lines[1:]) == {"vllm": "0.11.0", "nccl": "2.28.9"}
    assert incident.versions_in(["vLLM API server version", "anything"]) == {}
