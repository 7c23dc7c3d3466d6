"""One process of the engine from close by, as far as /proc shows it."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.engine.leftovers import SHM
from mgpu_llm.adapters.engine.tree import PROC, read_proc

#: So many files are named, and looked at.
MOST_NAMED: Final = 200
MOST_FILES: Final = 20_000
#: Files that may be why a load stands: models, locks, shared memory, devices.
TELLING: Final = re.compile(
    r"/dev/(?:nvidia|shm/|infiniband|dri/)|\.(?:safetensors|bin|pt|pth|gguf|lock)(?: \(deleted\))?$|/\.locks/|\.incomplete$"
)
_MASKS: Final = ("Cpus_allowed:", "Mems_allowed:", "Sig", "Shd", "Cap")


def close_up(pid: int, model: str = "") -> dict[str, Any]:
    """What of the process can be seen without waiting for locks of its memory; {} once it has ended. `model` is the model's
    folder, whose open files are named."""
    status = _lines(f"{pid}/status")
    if not status:
        return {}
    return {
        "pid": pid,
        "status": {
            key: " ".join(value.split())
            for key, _, value in (line.partition(":") for line in status if not line.startswith(_MASKS))
        },
        "waits_in": read_proc(f"{pid}/wchan").decode("ascii", "replace"),
        "io": {
            key: int(value)
            for key, _, value in (line.partition(": ") for line in _lines(f"{pid}/io"))
            if value.isdecimal()
        },
        "limits": [" ".join(line.split()) for line in _lines(f"{pid}/limits")[1:]],
        "oom_score_adj": read_proc(f"{pid}/oom_score_adj").decode("ascii", "replace").strip(),
        "cgroup": _lines(f"{pid}/cgroup")[-1:],
        "open": _open_files(PROC / str(pid) / "fd", model),
    }


def command_line(pid: int) -> list[str]:
    """May wait on a process that is stuck: the words are read from its memory."""
    words = read_proc(f"{pid}/cmdline").decode("utf-8", "replace").rstrip("\0")
    return words.split("\0") if words else []


def _open_files(folder: Path, model: str) -> dict[str, Any]:
    kinds, named = Counter[str](), set[str]()
    try:
        descriptors = os.listdir(folder)  # noqa: PTH208 - there may be thousands
    except OSError as error:
        return {"unobserved": (error.strerror or "").lower()}
    for descriptor in descriptors[:MOST_FILES]:
        with contextlib.suppress(OSError):
            target = os.readlink(folder / descriptor)  # noqa: PTH115 - likewise
            kinds[_kind(target)] += 1
            if TELLING.search(target) or (model.startswith("/") and target.startswith(model)):
                named.add(target)
    return {"count": len(descriptors), "kinds": dict(kinds.most_common()), "files": sorted(named)[:MOST_NAMED]}


def _kind(target: str) -> str:
    if target.startswith("/dev/nvidia"):
        return "nvidia device"
    if target.startswith((f"{SHM}/", "/memfd:")):
        return "shared memory"
    if target.startswith("/"):
        return "device" if target.startswith("/dev/") else "file"
    return target.partition(":[")[0].removeprefix("anon_inode:").strip("[]")


def _lines(name: str) -> list[str]:
    return read_proc(name).decode("utf-8", "replace").splitlines()
