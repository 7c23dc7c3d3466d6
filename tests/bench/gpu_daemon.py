"""mgpud itself over the real vLLM on two GPUs that are broken on purpose: what it noticed, when, and how it came to service.

    PYTHONPATH=SITE:daemon:. python3 -m tests.bench.gpu_daemon --out FOLDER --model FOLDER [OPTION...] [FAULT...]

For each fault of tests/support/fault_plugin_cuda ("none" is a healthy engine) one life of the daemon: it is started, waited for
until it serves or gives up, asked for its status, and stopped. With --again there is a second life with the same state
folder, which knows what served. FOLDER gets each life's log and last status, recordings, incidents and summary.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mgpu_llm.control_api import SOCKET_NAME
from mgpu_llm.ctl.client import Client, Failure
from tests.bench.gpu_campaign import ENGINE_ENV, FAULT_PLUGIN
from tests.support.toy_setup import free_port

FAULTS: Final = ("p2p-hang", "custom-all-reduce-hang", "none")
POLL_S: Final = 0.5
STOP_S: Final = 90.0


def config(folder: Path, model: Path, fault: str, args: Sequence[str]) -> str:
    """The daemon's config for one life, as TOML."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(FAULT_PLUGIN)])
    env = {**ENGINE_ENV, "PYTHONPATH": path, **({} if fault == "none" else {"MGPU_FAULT": fault})}
    return "\n".join(
        [
            f'[model]\npath = "{model}"\nserved_name = "m"',
            f'[engine]\npython = "{sys.executable}"\nport = {free_port()}',
            f"args = {json.dumps(['--max-model-len', '4096', *args])}",
            "[engine.env]",
            *(f"{name} = {json.dumps(value)}" for name, value in env.items()),
            "[gpus]\nuse = [0, 1]\nmemory_utilisation = 0.9",
            f'[daemon]\nruntime_dir = "{folder / "run"}"\nstate_dir = "{folder / "state"}"\n',
        ]
    )


def lives(given: argparse.Namespace, fault: str, limit_s: float) -> Iterator[str]:
    """What came of each life."""
    folder = Path(tempfile.mkdtemp(prefix="mgpu-"))
    (folder / "mgpu-llm.toml").write_text(config(folder, given.model.resolve(), fault, given.arg), encoding="utf-8")
    began = time.monotonic()
    for name in (fault, f"{fault}-again") if given.again else (fault,):
        yield live(given.out, folder, name, limit_s - (time.monotonic() - began))
    shutil.copytree(folder / "state", given.out / f"{fault}-state", dirs_exist_ok=True)
    shutil.rmtree(folder)


def live(out: Path, folder: Path, name: str, limit_s: float) -> str:
    """One life with the config in `folder`; returns what came of it."""
    client, began = Client(str(folder / "run" / SOCKET_NAME)), time.monotonic()
    status: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "mgpu_llm", "--config", folder / "mgpu-llm.toml"], stdout=log, stderr=log
        )
        while daemon.poll() is None and time.monotonic() - began < limit_s and status.get("state") != "ready":
            time.sleep(POLL_S)
            try:
                status = client.status_document()
            except Failure:
                continue
        ready_s, asked = time.monotonic() - began, time.monotonic()
        daemon.terminate()
        try:
            ended = f"stopped with {daemon.wait(STOP_S)} after {time.monotonic() - asked:.1f} s"
        except subprocess.TimeoutExpired:
            daemon.kill()
            ended = "had to be killed"
    (out / f"{name}.json").write_text(json.dumps(status, indent=1), encoding="utf-8")
    return f"{name}: {_told(status)}; {ready_s:.0f} s in all; {ended}"


def _told(status: Mapping[str, Any]) -> str:
    attempts = [
        f"{found['rung']} {found['outcome']} after {found['duration_s']:.1f} s {found['cause']}"
        for found in status.get("attempts", ())
    ]
    return f"{status.get('state', 'no answer')} ({'; '.join(attempts)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for all of them, default %(default)s")
    parser.add_argument("--again", action="store_true", help="a second life with the same state folder")
    parser.add_argument("--arg", action="append", default=[], help="one more argument for the engine")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; without: all")
    given = parser.parse_args()
    until, told = time.monotonic() + given.budget, list[str]()
    for fault in given.faults or FAULTS:
        for came in lives(given, fault, until - time.monotonic() - 20):
            told.append(came)
            print(came, flush=True)
            (given.out / "summary.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
