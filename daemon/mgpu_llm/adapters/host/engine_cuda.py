"""For which CUDA the engine's PyTorch was built, told by its own Python without importing PyTorch, which would load CUDA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mgpu_llm.adapters.host.engine_versions import python_of
from mgpu_llm.adapters.host.program import RunAs, Unanswered, ask

LIMIT_S: Final = 5.0
#: torch/version.py is a file of assignments, written when PyTorch is built (torch 1.0 to 2.13).
_ASKED: Final = """\
import sys
sys.path[:] = [place for place in sys.path if place]
import importlib.util, json, os, runpy
found = importlib.util.find_spec("torch").submodule_search_locations[0]
told = runpy.run_path(os.path.join(found, "version.py"))
print(json.dumps({name: told.get(name) for name in ("cuda", "hip")}))
"""


@dataclass(frozen=True, kw_only=True)
class Built:
    """As in "12.8"; "" for a PyTorch without it."""

    cuda: str
    hip: str


def built(command: Sequence[str], environment: Mapping[str, str], run_as: RunAs | None = None) -> Built | None:
    """None where nobody tells: `command` is no Python's, there is no PyTorch, or no answer within five seconds. `environment` is
    the engine's, whole. Blocks, and where the disk is stuck for ever. Raises nothing."""
    try:
        python = python_of(command, environment)
        if not python:
            return None
        answer = ask([*python, "-c", _ASKED], limit_s=LIMIT_S, environment=environment, run_as=run_as)
        said = json.loads(answer.splitlines()[-1])
        return Built(cuda=str(said["cuda"] or ""), hip=str(said["hip"] or ""))
    except (OSError, ValueError, LookupError, TypeError, Unanswered):
        return None
