"""Memory, pressure, load and disks of the host."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.host.program import ask

PROC: Final = Path("/proc")
SHM: Final = Path("/dev/shm")  # noqa: S108 - the place itself is meant
MOST_ENTRIES: Final = 300
TOPOLOGY_S: Final = 4.0
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
#: Where engines keep what a start needs, each as its variable or its usual place says.
CACHES: Final = {
    "HF_HOME": "~/.cache/huggingface",
    "HF_HUB_CACHE": "",
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
    "XDG_CACHE_HOME": "~/.cache",
    "TORCHINDUCTOR_CACHE_DIR": "",
    "TORCH_EXTENSIONS_DIR": "",
    "TRITON_CACHE_DIR": "~/.triton",
    "FLASHINFER_WORKSPACE_BASE": "",
    "CUDA_CACHE_PATH": "~/.nv",
    "TMPDIR": "/tmp",  # noqa: S108 - likewise
}


def read() -> dict[str, Any]:
    """What the kernel counts. A part that it does not tell is left out."""
    pressure = {name: _text(PROC / "pressure" / name).splitlines() for name in ("cpu", "memory", "io")}
    memory = dict(line.split(":", 1) for line in _text(PROC / "meminfo").splitlines() if ":" in line)
    return {
        "pressure": {name: lines for name, lines in pressure.items() if lines},
        "meminfo": {name: " ".join(value.split()) for name, value in memory.items()},
        "loadavg": _text(PROC / "loadavg").strip(),
        "uptime_s": _text(PROC / "uptime").partition(" ")[0],
        "kernel_command_line": _text(PROC / "cmdline").strip(),
        "cpus": os.cpu_count(),
    }


def shared_memory() -> dict[str, Any]:
    """How much is free, and who has what there, the largest first."""
    entries = list[dict[str, Any]]()
    with contextlib.suppress(OSError), os.scandir(SHM) as found:
        for entry in found:
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                entries.append({"name": entry.name, "bytes": stat.st_size, "uid": stat.st_uid})
    entries.sort(key=lambda entry: -entry["bytes"])
    return {**free(SHM), "count": len(entries), "entries": entries[:MOST_ENTRIES]}


def places(environment: Mapping[str, str], *more: str) -> dict[str, str]:
    """Folders whose disks may be full, by what they are: the engine's caches, and `more` by themselves."""
    home = environment.get("HOME", "/")
    found = {name: environment.get(name) or usual.replace("~", home, 1) for name, usual in CACHES.items()}
    return {name: path for name, path in {**found, **{path: path for path in more}}.items() if path.startswith("/")}


def free(path: Path) -> dict[str, Any]:
    """Of the disk on which the path is, or would be. A network file system that is gone never answers."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return {"path": str(path), "unobserved": (error.strerror or "").lower()}
    size = disk.f_frsize
    return {
        "path": str(path),
        "free_bytes": disk.f_bavail * size,
        "total_bytes": disk.f_blocks * size,
        "free_inodes": disk.f_favail,
    }


def topology() -> list[str]:
    """How the GPUs are connected, in nvidia-smi's own words. Raises Unanswered."""
    # It underlines its table also where no terminal reads it.
    said = _ESCAPES.sub("", ask(["nvidia-smi", "topo", "-m"], limit_s=TOPOLOGY_S))
    return said.splitlines()[:MOST_ENTRIES]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
