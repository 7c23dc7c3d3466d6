"""Try the preflight on real GPUs, healthy and broken on purpose, and print what it finds and how long it takes, as JSON lines.

    PYTHONPATH=SITE:daemon:. python3 -m tests.bench.preflight [--gpus 0,1] [--python PYTHON] [NAME...]

NAME is a case below; without, all. A case is `ok` if it is found as it must be; the exit status says whether all are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from mgpu_llm.adapters.memory.preflight import PassedPreflights
from mgpu_llm.adapters.preflight import Preflight
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked
from tests.support.toy_setup import ROOT

FAULT_PLUGIN: Final = ROOT / "tests/support/fault_plugin_cuda"
#: NVLink multicast can harm a host that others share.
ALWAYS: Final[Mapping[str, str]] = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
TRANSPORTS: Final[Mapping[str, Mapping[str, str]]] = {
    AS_LAUNCHED: {},
    "p2p-off": {"NCCL_P2P_DISABLE": "1"},
    "p2p-and-shm-off": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
MARK: Final = "BENCH_PREFLIGHT"
IDLE_WITHIN_BYTES: Final = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """`works` is what must be found, by transport; what is left out may be anything."""

    environment: Mapping[str, str] = field(default_factory=dict)
    works: Mapping[str, bool] = field(default_factory=dict)
    remembered: bool = False
    cancel_s: float | None = None


CURED: Final = {AS_LAUNCHED: False, "p2p-off": True}
#: In this order: "remembered" is of what "healthy" has passed.
CASES: Final[Mapping[str, Case]] = {
    "healthy": Case(works={AS_LAUNCHED: True}),
    "remembered": Case(works={AS_LAUNCHED: True}, remembered=True),
    "p2p-off": Case(environment={"NCCL_P2P_DISABLE": "1"}, works={AS_LAUNCHED: True}),
    "sockets": Case(environment={"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}, works={AS_LAUNCHED: True}),
    "p2p-hang": Case(environment={"MGPU_FAULT": "p2p-hang"}, works=CURED),
    "rank-missing": Case(environment={"MGPU_FAULT": "rank-missing"}, works=CURED),
    "cancelled": Case(environment={"MGPU_FAULT": "p2p-hang"}, cancel_s=9.0),
}


async def tried(case: Case, preflight: Preflight, gpus: Mapping[str, str], told: Gpus) -> dict[str, Any]:
    """One row: what was found, when, what the GPUs held before and hold right after, and what was left of it."""
    environment = {**os.environ, **ALWAYS, **case.environment, MARK: str(os.getpid())}
    if "MGPU_FAULT" in case.environment:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FAULT_PLUGIN), environment.get("PYTHONPATH"))))
    before, began = await held(told, gpus), time.monotonic()
    check = preflight.check(gpus, environment, TRANSPORTS)
    checked: Checked | None = None
    cancelled_s = None
    try:
        checked = await asyncio.wait_for(check, case.cancel_s)
    except TimeoutError:
        cancelled_s = time.monotonic() - began - (case.cancel_s or 0.0)
    wall_s = time.monotonic() - began
    left, after = marked(), await held(told, gpus)
    ok = checked is None if case.cancel_s is not None else checked is not None and as_it_must_be(case, checked)
    grown = [now - then for now, then in zip(after, before, strict=True)]
    return {
        "ok": ok and not left and max(grown, default=0) <= IDLE_WITHIN_BYTES,
        "wall_s": round(wall_s, 2),
        "cancellation_took_s": cancelled_s,
        "grown_mib": [extra >> 20 for extra in grown],
        "left": left,
        "checked": None if checked is None else plain(checked),
    }


def as_it_must_be(case: Case, checked: Checked) -> bool:
    found = {transport.name: transport.works for transport in checked.transports}
    right = all(found.get(name) is works for name, works in case.works.items())
    return right and checked.remembered is case.remembered and not checked.unobserved and not checked.gpus


def plain(checked: Checked) -> dict[str, Any]:
    found = asdict(checked)
    found["pairs"] = {" -> ".join(pair): why for pair, why in checked.pairs.items()}
    return found


async def held(told: Gpus, gpus: Mapping[str, str]) -> list[int]:
    """Bytes, by GPU."""
    return [reading.memory_used_bytes for reading in await told.read(list(gpus.values()), 10)]


def marked() -> list[str]:
    """Processes of ours that are still there."""
    found, mark = [], f"\0{MARK}={os.getpid()}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(f"{(entry / 'comm').read_text().strip()} ({entry.name})")
            except OSError:
                continue
    return found


async def run(given: argparse.Namespace) -> bool:
    told = Gpus()
    try:
        inventory = await told.inventory(60)
    except GpusUnobserved as silence:
        print(f"cannot look at the GPUs: {silence.reason}", file=sys.stderr)
        return False
    entries = given.gpus.split(",")
    gpus = {entry: inventory[int(entry)].uuid for entry in entries}
    well = True
    with tempfile.TemporaryDirectory() as folder:
        memory = PassedPreflights(Path(folder))
        for name in given.names or CASES:
            kept = memory if name in ("healthy", "remembered") else None
            preflight = Preflight(
                python=(given.python,), memory=kept, key={}, deadline_s=given.deadline, clock=time.monotonic
            )
            row = await tried(CASES[name], preflight, gpus, told)
            print(json.dumps({"case": name, **row}), flush=True)
            well = well and row["ok"]
        memory.close()
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="0,1", help="indices, default %(default)s")
    parser.add_argument("--python", default=sys.executable, help="the engine's, default this one")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for a check, default %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; without: all")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in CASES]:
        parser.error(f"there is no case {', '.join(unknown)}")
    return 0 if asyncio.run(run(given)) else 1


if __name__ == "__main__":
    sys.exit(main())
