"""What goes wrong in this stand-in, told by FAKE_TORCH: JSON, a list of faults, of which each is

at      where: "import", "init", "context", "matmul", "copy", "meet" or "all_reduce"
do      what: "hang", "sleep" (for `s` seconds), "raise" (`kind` with `text`), "wrong", "die" (by signal `number`), "print"
gpu     only there; for a copy: from there        to: for a copy, only to there
unless  only where the environment has none of these variables with these values; this is how a transport cures
over    only where so many GPUs or more take part
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any


class OutOfMemoryError(RuntimeError): ...


class DistBackendError(RuntimeError): ...


class DistStoreError(RuntimeError): ...


KINDS = {
    "OutOfMemoryError": OutOfMemoryError,
    "DistBackendError": DistBackendError,
    "DistStoreError": DistStoreError,
    "RuntimeError": RuntimeError,
    "ImportError": ImportError,
}


def come(at: str, *, gpu: int | None = None, to: int | None = None, ranks: int = 0) -> bool:
    """What is wrong at this place happens now. Returns whether the result is to be a wrong one."""
    return any(_happen(fault) for fault in _faults() if _meant(fault, at, gpu, to, ranks))


def _faults() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(os.environ.get("FAKE_TORCH", "[]"))
    return found


def _meant(fault: dict[str, Any], at: str, gpu: int | None, to: int | None, ranks: int) -> bool:
    cured = any(os.environ.get(name) == value for name, value in fault.get("unless", {}).items())
    place = fault["at"] == at and fault.get("gpu") in (None, gpu) and fault.get("to") in (None, to)
    return place and not cured and fault.get("ranks") in (None, ranks)


def _happen(fault: dict[str, Any]) -> bool:
    does = fault["do"]
    if does == "hang":
        while True:
            time.sleep(3600)
    if does == "sleep":
        time.sleep(fault["s"])
    if does == "die":
        os.kill(os.getpid(), signal.Signals(fault["number"]))
    if does == "print":
        for number in range(fault["lines"]):
            print(f"{number}: {fault['text']}", flush=True)
    if does == "raise":
        raise KINDS[fault["kind"]](fault["text"])
    return bool(does == "wrong")
