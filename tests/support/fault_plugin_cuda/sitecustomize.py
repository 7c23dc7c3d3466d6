"""The same faults where no vLLM is: in the probe with which mgpu-llm tries GPUs before an engine reaches them.

Python imports this at its start if the folder is on PYTHONPATH. It does nothing unless MGPU_LLM_PREFLIGHT is set, as in every
probe, and MGPU_FAULT names a fault of the first all-reduce. Another sitecustomize that this one hides is run as well.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
MODULE = "torch.distributed"
VICTIM = 1
#: Clock cycles: centuries.
FOR_EVER = 1 << 60


class Breaking(importlib.abc.Loader):
    """Loads as `healthy` does, and then breaks what it has loaded."""

    def __init__(self, healthy: Any) -> None:
        self.healthy = healthy

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.healthy.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.healthy.exec_module(module)
        break_all_reduce(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch.distributed where everybody finds it, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = Breaking(spec.loader)
                return spec
        return None


def break_all_reduce(distributed: Any) -> None:
    healthy = distributed.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        # The ranks are forked after this was loaded, each with the environment of the transport that it tries.
        cured = os.environ.get("NCCL_P2P_DISABLE") == "1"
        if not cured and distributed.get_world_size() > 1 and distributed.get_rank() == VICTIM:
            if os.environ["MGPU_FAULT"] == "rank-missing":
                while True:
                    time.sleep(3600)
            importlib.import_module("torch").cuda._sleep(FOR_EVER)
        return healthy(*args, **kwargs)

    distributed.all_reduce = all_reduce


def run_hidden() -> None:
    """The sitecustomize that Python would have found without this one."""
    places = [place for place in sys.path if Path(place or ".").resolve() != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("MGPU_LLM_PREFLIGHT") and os.environ.get("MGPU_FAULT") in ("p2p-hang", "rank-missing"):
    sys.meta_path.insert(0, Finder())
run_hidden()
