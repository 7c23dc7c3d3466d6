"""What the hardware bench ran on: GPUs, driver, memory, versions, and the shape of the model."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.gpus import Gpu, Gpus, GpusUnobserved
from mgpu_llm.adapters.host import engine_versions

#: The first call wakes the GPUs.
AWAKE_S: Final = 60.0
TOLD_S: Final = 10.0


def cards(indices: Sequence[int]) -> tuple[Gpu, ...]:
    """The GPUs of these indices, in this order. Raises GpusUnobserved, and ValueError for one that is not there."""
    there = asyncio.run(Gpus().inventory(AWAKE_S))
    if missing := [index for index in indices if index >= len(there)]:
        raise ValueError(f"cannot use GPU {missing[0]}: there are {len(there)}")
    return tuple(there[index] for index in indices)


def hardware(gpus: Sequence[Gpu], python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """{"gpus": [str], "gpu_bytes": [int], "nvlink": bool | None, "driver", "cuda", "cpus": int, "ram_bytes": int, "vllm",
    "torch", "nccl", "python", "date"}; None or "" is what was not told."""
    told = asyncio.run(_told([gpu.uuid for gpu in gpus])) if gpus else {}
    versions = engine_versions.versions((python,), {**os.environ, **env})
    return {
        "gpus": [gpu.name for gpu in gpus],
        "gpu_bytes": [gpu.memory_total_bytes for gpu in gpus],
        "nvlink": told.get("nvlink"),
        "driver": told.get("driver", ""),
        "cuda": told.get("cuda", ""),
        "cpus": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: versions.get(name, "") for name in ("vllm", "torch", "nccl")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


async def _told(uuids: Sequence[str]) -> dict[str, Any]:
    gpus, told = Gpus(), dict[str, Any]()
    try:
        told |= await gpus.versions(TOLD_S)
        pairs = len(uuids) * (len(uuids) - 1) // 2
        told["nvlink"] = len(await gpus.nvlinked(uuids, TOLD_S)) == pairs if pairs else None
    except GpusUnobserved:
        return told
    return told


def model(folder: Path) -> dict[str, Any]:
    """{"name", "bytes": int of its weights, "config": what config.json says of its shape}."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = {key: value for key, value in config.items() if isinstance(value, int | float | str | list)}
    return {
        "name": folder.name,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "config": shape,
    }
