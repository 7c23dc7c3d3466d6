"""A host's GPUs as the daemon tells them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from tests.support.fake_nvml.asked import uuid

GIB = 2**30


def process(pid: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "kind": "compute",
        "used_bytes": 2 * GIB,
        "user": "ann",
        "command": "python train.py",
        "of_the_engine": False,
        **more,
    }


def gpu(index: int, **more: Any) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": uuid(index),
        "name": "NVIDIA H100 80GB HBM3",
        "pci": f"00000000:{0x10 + index:02X}:00.0",
        "lost": "",
        "untold": "",
        "memory_total_bytes": 85_520_809_984,
        "memory_used_bytes": 0,
        "memory_free_bytes": 85_017_493_504,
        "memory_reserved_bytes": 503_316_480,
        "utilisation_percent": 0,
        "power_mw": 73_715,
        "power_limit_mw": 700_000,
        "temperature_c": 38,
        "ecc": True,
        "ecc_uncorrected": 0,
        "recovery_action": "none",
        "mig": False,
        "mig_slices": [],
        "compute_mode": "default",
        "persistence": True,
        "processes": [],
        "configured": False,
        "in_use": False,
        **more,
    }


def lost(index: int, **more: Any) -> dict[str, Any]:
    """One that tells nothing any more, as far as it is known."""
    known = ("index", "uuid", "name", "pci", "untold", "configured", "in_use")
    kept = {key: value if key in known else None for key, value in gpu(index).items()}
    return {**kept, "lost": "GPU is lost (NVML error 15)", **more}


def pair(one: int, other: int, **more: Any) -> dict[str, Any]:
    return {"gpus": [one, other], "path": "node", "nvlink": False, "p2p_read": "ok", "p2p_write": "ok", **more}


def host(gpus: list[dict[str, Any]], pairs: dict[tuple[int, int], dict[str, Any]] | None = None) -> dict[str, Any]:
    """All pairs are `pair`s, but for what `pairs` has of them."""
    there = [one["index"] for one in gpus if not one["lost"]]
    return {
        "driver": "580.159.04",
        "cuda": "13.0",
        "nvml": "13.580.159.04",
        "gpus": gpus,
        "pairs": [pair(*two, **(pairs or {}).get(two, {})) for two in combinations(there, 2)],
        "missing": [],
    }


WORKER = {"user": "mgpu-llm", "command": "VLLM::Worker_TP0", "of_the_engine": True, "used_bytes": 70 * GIB}
#: Two in use by the engine, one that somebody else computes on, one that is named in the config and lost.
HOST_GPUS = host(
    [
        gpu(
            0,
            configured=True,
            in_use=True,
            memory_used_bytes=70 * GIB,
            utilisation_percent=100,
            power_mw=690_400,
            temperature_c=81,
            processes=[process(4711, **WORKER)],
        ),
        gpu(1, configured=True, in_use=True, ecc_uncorrected=3, processes=[process(4712, **WORKER)]),
        gpu(2, recovery_action="reset", processes=[process(99, kind="compute+graphics")]),
        lost(3, configured=True),
    ],
    {
        (0, 1): {"nvlink": True},
        (0, 2): {"path": "system", "p2p_read": "not supported", "p2p_write": "not supported"},
        (1, 2): {"path": "hostbridge", "p2p_read": "chipset not supported"},
    },
)
