"""Break starts of the real vLLM on this machine's CPU in every way that a CPU can show, and keep what it says.

    python -m tests.bench.make_excerpts [--out FOLDER] [NAME...]

Writes NAME.log.gz (its last lines, paths made neutral) for each. Needs root, `make dev`, cgroup v1, and 400 MB below /var/tmp.
All of them take about half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Final

from tests.bench.breakages import BREAKAGES, WORK, Breakage
from tests.bench.surroundings import Change, Place
from tests.support.toy_model import write_toy_model
from tests.support.toy_setup import ENGINE_ENV, ENGINE_PYTHON, ROOT, free_port

EXCERPTS: Final = ROOT / "tests/data/excerpts/recorded"
REWRITES: Final = {
    str(WORK / "run/disk"): "/srv/models",
    str(WORK / "run"): "/srv/models",
    str(WORK / "models"): "/srv/models",
    str(WORK): "/var/lib/vllm",
    str(ENGINE_PYTHON.parents[1]): "/opt/vllm",
    str(ROOT): "/opt/mgpu-llm",
    str(ENGINE_PYTHON.resolve().parents[1]): "/usr",
    socket.gethostname(): "gpuhost",
}
LAST_LINES: Final = 200


def make(name: str, out: Path) -> int | None:
    """Run one; returns its exit status, None where it had to be ended."""
    broken = BREAKAGES[name]
    model = WORK / "models/toy"
    write_toy_model(model, broken.shape)
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with broken.surroundings(Place(folder=folder, model=model)) as change:
        lines, status = _run(broken, change, folder)
    kept = lines[-LAST_LINES:]
    text = "\n".join(neutral(line) for line in kept)
    (out / f"{name}.log.gz").write_bytes(gzip.compress(f"{text}\n".encode(), mtime=0))
    return status


def neutral(line: str) -> str:
    """The line without colours and without where this machine has its things."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    for old, new in REWRITES.items():
        line = line.replace(old, new)
    return line


def _run(broken: Breakage, change: Change, folder: Path) -> tuple[list[str], int | None]:
    port = change.env.get("EXCERPT_PORT") or str(free_port())
    serve = [str(ENGINE_PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(change.model)]
    serve += ["--served-model-name", "toy", "--host", "127.0.0.1", "--port", port]
    serve += ["--tensor-parallel-size", str(broken.tensor_parallel), *broken.args]
    engine = subprocess.Popen(
        [*change.before, *serve],
        cwd=folder,
        env=_env(broken, change),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert engine.stdout is not None
    lines = list[str]()
    reader = threading.Thread(target=_read, args=(engine.stdout, lines, broken, engine.pid), daemon=True)
    reader.start()
    status: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = engine.wait(broken.limit_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()
    reader.join(10.0)
    return lines, status


def _read(output: IO[bytes], lines: list[str], broken: Breakage, session: int) -> None:
    left = b""
    killed = False
    while chunk := output.read1(65536):  # type: ignore[attr-defined]
        *whole, left = re.split(rb"[\r\n]+", left + chunk)
        lines += [line.decode(errors="replace") for line in whole if line.strip()]
        if broken.kill and not killed and any(re.search(broken.kill[1], line) for line in lines):
            killed = _kill(broken.kill[0], session, broken.with_signal)


def _kill(name: str, session: int, with_signal: int) -> bool:
    """Send the signal to the last process of the session with that name, once it has it."""
    for _ in range(100):
        listed = subprocess.run(
            ["ps", "-s", str(session), "-o", "pid=,comm="], capture_output=True, text=True, check=False
        )
        pids = [int(row.split()[0]) for row in listed.stdout.splitlines() if row.split(None, 1)[1].startswith(name)]
        if pids:
            os.kill(pids[-1], with_signal)
            return True
        time.sleep(0.1)
    return True


def _env(broken: Breakage, change: Change) -> dict[str, str]:
    own = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    binding = {1: "0-1", 2: "0|1"}.get(broken.tensor_parallel, "nobind")
    where = {"VLLM_CACHE_ROOT": str(WORK / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(WORK / "cache/inductor")}
    bind = {"VLLM_CPU_OMP_THREADS_BIND": binding, "HOME": str(WORK / "home"), "HF_HOME": str(WORK / "hub")}
    return {**own, **ENGINE_ENV, **bind, **where, **broken.env, **change.env}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EXCERPTS, help="default %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BREAKAGES)}; all without")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BREAKAGES]:
        parser.error(f"there is no {', '.join(unknown)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or BREAKAGES:
        began = time.monotonic()
        status = make(name, given.out.resolve())
        how = "did not end" if status is None else f"exit status {status}"
        print(f"{name}: {how} after {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
