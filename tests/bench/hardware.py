"""The hardware bench: the real vLLM on real GPUs, alone and under mgpud, healthy and broken on purpose, with the clock on it.

    python3 -m tests.bench.hardware --out FOLDER --model FOLDER [--gpus 0,1] [--budget SECONDS] [--arg=ARG ...] SERIES...
    python3 -m tests.bench.hardware --page FILE.json... --write docs/hardware.md

The Python that runs it has the daemon's dependencies, and vLLM too unless --engine-python names another. FOLDER gets
results.json, written anew after every life so that a run that is cut off keeps what it had, each life's log, and its recordings
and incidents. Whatever no longer fits into the budget is left out, and the results say so. --cpu rehearses it all on the CPU
build of vLLM with a toy model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.gpus import GpusUnobserved
from tests.bench.gpu_campaign import ENGINE_ENV, FAULT_PLUGIN
from tests.bench.hardware_host import cards, hardware, model
from tests.bench.hardware_life import Bench
from tests.bench.hardware_series import SERIES, Campaign, command
from tests.support import toy_setup

FORMAT: Final = 1


class Results:
    """results.json, written anew with everything that is added."""

    def __init__(self, file: Path, head: Mapping[str, Any]) -> None:
        self._file = file
        self._document: dict[str, Any] = {"format": FORMAT, **head, "lives": [], "notes": [], "not_run": []}
        self._write()

    def add(self, where: str, row: dict[str, Any]) -> None:
        """One more life, note or thing that was not run."""
        self._document[where].append(row)
        self._write()
        print(_line(where, row), flush=True)

    def _write(self) -> None:
        # Beside it and then renamed: a run that is cut off here leaves the last whole one.
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._file)


def _line(where: str, row: Mapping[str, Any]) -> str:
    if where != "lives":
        return f"{where}: {json.dumps(row)}"
    attempts = "; ".join(f"{one['rung']} {one['outcome']} {one['cause']}".strip() for one in row.get("attempts", ()))
    kills = ", ".join(f"{kill['clean_s']}" for kill in row.get("kills", ()))
    return f"{row['name']}: ready after {row['ready_s']} s ({attempts}) clean after {kills or 'no kill'}; left {row['left']}"


def bench(given: argparse.Namespace) -> Bench:
    """What all lives have in common."""
    if given.cpu:
        toy_setup.make_checkpoint()
        return Bench(
            out=given.out.resolve(),
            model=toy_setup.CHECKPOINT,
            python=str(toy_setup.ENGINE_PYTHON),
            cards=(),
            args=(*toy_setup.ENGINE_ARGS, *given.arg),
            env=toy_setup.ENGINE_ENV,
            tensor_parallel=2,
        )
    found = cards([int(index) for index in given.gpus.split(",")])
    # Its folder first: whatever else is called sitecustomize must not hide the one that breaks the check of the GPUs, too.
    path = os.pathsep.join([str(FAULT_PLUGIN), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return Bench(
        out=given.out.resolve(),
        model=given.model.resolve(),
        python=given.engine_python,
        cards=found,
        args=("--max-model-len", given.max_model_len, *given.arg),
        env={**ENGINE_ENV, "PYTHONPATH": path},
        tensor_parallel=len(found),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where results.json and the logs go")
    parser.add_argument("--model", type=Path, help="the checkpoint's folder")
    parser.add_argument("--gpus", default="0,1", help="their indices, default %(default)s")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all of it, default %(default)s")
    parser.add_argument("--arg", action="append", default=[], help="one more argument for vLLM; may be repeated")
    parser.add_argument("--max-model-len", default="4096", help="default %(default)s")
    parser.add_argument("--engine-python", default=sys.executable, help="of vLLM's environment, default this one")
    parser.add_argument("--repeat", type=int, default=3, help="healthy starts of each kind, default %(default)s")
    parser.add_argument(
        "--alone-limit", type=float, default=300.0, help="how long vLLM alone may hang, default %(default)s"
    )
    parser.add_argument("--no-warm-up", action="store_true", help="no start before the first that counts")
    parser.add_argument("--with-off", action="store_true", help="healthy starts with preflight off, too")
    parser.add_argument("--meanwhile", default="", help="a command beside vLLM that hangs alone; it must not use GPUs")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal: vLLM's CPU build and a toy model")
    parser.add_argument("--page", action="store_true", help="make the page from files of results")
    parser.add_argument("--write", type=Path, help="where the page goes, default stdout")
    parser.add_argument("names", nargs="*", metavar="SERIES", help=f"of {', '.join(SERIES)}; with --page: files")
    given = parser.parse_args()
    if not given.page:
        if unknown := [name for name in given.names if name not in SERIES]:
            parser.error(f"there is no series {', '.join(unknown)}; there are {', '.join(SERIES)}")
        if not given.names or given.out is None or (given.model is None and not given.cpu):
            parser.error("--out, --model and a series are needed")
    return given


def write_page(files: Sequence[str], to: Path | None) -> None:
    """The page of results."""
    # Where lives are run, all that the page reckons with need not be there.
    from tests.bench.hardware_page import page

    text = page({Path(name).name: json.loads(Path(name).read_text(encoding="utf-8")) for name in files})
    if to is None:
        print(text, end="")
    else:
        to.write_text(text, encoding="utf-8")


def run(given: argparse.Namespace) -> None:
    """All series, within the budget."""
    until = time.monotonic() + given.budget
    given.out.mkdir(parents=True, exist_ok=True)
    shared = bench(given)
    host = hardware(shared.cards, shared.python, shared.env)
    head: dict[str, Any] = {
        "command": command(),
        "hardware": host,
        "model": model(shared.model),
        "arguments": list(shared.args),
    }
    head |= {"tensor_parallel": shared.tensor_parallel, "asked": list(given.names)}
    results = Results(given.out / "results.json", head)
    campaign = Campaign(
        bench=shared,
        until=until,
        repeat=given.repeat,
        alone_limit_s=given.alone_limit,
        warm_up=not given.no_warm_up,
        with_off=given.with_off,
        meanwhile=given.meanwhile,
        add=results.add,
    )
    for name in given.names:
        try:
            SERIES[name](campaign)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            results.add("not_run", {"series": name, "kind": "", "fault": "", "why": str(error)})


def main() -> int:
    given = arguments()
    # So that whatever runs is ended with us, as it is by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if given.page:
            write_page(given.names, given.write)
        else:
            run(given)
    except (GpusUnobserved, ValueError, OSError) as error:
        print(f"hardware: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
