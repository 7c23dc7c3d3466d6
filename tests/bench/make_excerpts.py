"""Break starts of the real vLLM on this machine's CPU in every way that a CPU can show, and keep what it says.

    python -m tests.bench.make_excerpts [--out FOLDER] [NAME...]

Writes NAME.log.gz (its last lines, paths made neutral) for each. Needs root, `make dev`, cgroup v1, and 400 MB below /var/tmp.
All of them take about half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from tests.bench import surroundings as around
from tests.bench.surroundings import MIB, Change, Place, Surroundings
from tests.support.toy_model import Shape, write_toy_model
from tests.support.toy_setup import ENGINE_ARGS, ENGINE_ENV, ENGINE_PYTHON, ROOT, free_port

WORK: Final = Path("/var/tmp/mgpu-excerpts")
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
COMPILED: Final = tuple(arg for arg in ENGINE_ARGS if arg != "--enforce-eager")
LAST_LINES: Final = 200
FIRST_SHARD: Final = "checkpoint shards: +0%"
NOBODY: Final = 65534


@dataclass(frozen=True, kw_only=True)
class Breakage:
    """One start that must fail. `args` go after the model. `kill` is the name of a process, and the pattern of a line upon which
    it gets `with_signal`."""

    tensor_parallel: int = 2
    args: tuple[str, ...] = ENGINE_ARGS
    env: Mapping[str, str] = field(default_factory=dict)
    surroundings: Surroundings = around.ordinary
    kill: tuple[str, str] | None = None
    with_signal: int = signal.SIGKILL
    limit_s: float = 150.0
    shape: Shape = field(default_factory=Shape)


def edited(change: Callable[[Path], None]) -> Surroundings:
    """A copy of the model with something changed in its folder."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        model = place.folder / "toy"
        shutil.copytree(place.model, model)
        change(model)
        yield Change(model=model)

    return surroundings


def config(**changes: object) -> Surroundings:
    """The model's config.json with other values."""

    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edited(change)


def _shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _pointer(model: Path) -> None:
    _shards(model)[2].write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5e' * 32}\nsize 4976698672\n"
    )


def _cut(model: Path) -> None:
    shard = _shards(model)[2]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)


def _nothing(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


def _no_weights(model: Path) -> None:
    for path in [*_shards(model), model / "model.safetensors.index.json"]:
        path.unlink()


def _fewer_tensors(model: Path) -> None:
    """The index and the files say the same, but a layer is missing from both."""
    last = _shards(model)[-2]
    last.unlink()
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != last.name}
    file.write_text(json.dumps(index))


def named(model: str) -> Surroundings:
    """No folder: whatever is named is taken as it is."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        yield Change(model=Path(model))

    return surroundings


@contextlib.contextmanager
def port_taken(place: Place) -> Iterator[Change]:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield Change(model=place.model, env={"EXCERPT_PORT": str(taken.getsockname()[1])})


@contextlib.contextmanager
def not_ours(place: Place) -> Iterator[Change]:
    """The weights belong to somebody else, and root's right to read everything is dropped."""
    model = place.folder / "toy"
    shutil.copytree(place.model, model)
    for shard in _shards(model):
        os.chown(shard, NOBODY, NOBODY)
        shard.chmod(0o600)
    rights = "-dac_override,-dac_read_search"
    yield Change(model=model, before=("setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"))


def in_namespace(script: str) -> Surroundings:
    """The engine sees mounts of its own."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        yield Change(model=place.model, before=("unshare", "--mount", "sh", "-c", f'{script}; exec "$@"', "sh"))

    return surroundings


def limited(limit_bytes: int) -> Surroundings:
    """The kernel kills who needs more memory than that."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        group = around.CGROUPS / "memory/mgpu-excerpts"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
            yield Change(model=place.model, before=around.entering(group))
        finally:
            time.sleep(1.0)  # all have been killed; the group is empty once the kernel is done with them
            group.rmdir()

    return surroundings


def before(*command: str) -> Surroundings:
    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        yield Change(model=place.model, before=command)

    return surroundings


def _args(*more: str) -> tuple[str, ...]:
    return (*ENGINE_ARGS, *more)


BREAKAGES: Final[Mapping[str, Breakage]] = {
    "missing-path": Breakage(surroundings=named("/srv/models/none")),
    "empty-folder": Breakage(surroundings=edited(_nothing)),
    "no-weights": Breakage(surroundings=edited(_no_weights)),
    "cut-shard": Breakage(surroundings=edited(_cut)),
    "empty-shard": Breakage(surroundings=edited(lambda model: os.truncate(_shards(model)[2], 0))),
    "lfs-pointer": Breakage(surroundings=edited(_pointer)),
    "missing-shard": Breakage(surroundings=edited(lambda model: _shards(model)[2].unlink())),
    "missing-tensors": Breakage(surroundings=edited(_fewer_tensors)),
    "broken-config": Breakage(surroundings=edited(lambda model: os.truncate(model / "config.json", 40))),
    "broken-tokenizer": Breakage(surroundings=edited(lambda model: os.truncate(model / "tokenizer.json", 40))),
    "hub-offline": Breakage(surroundings=named("no/such")),
    "hub-unreachable": Breakage(
        surroundings=named("no/such"), env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    ),
    "tp-indivisible": Breakage(tensor_parallel=3),
    "too-long": Breakage(args=_args("--max-model-len", "99999")),
    "unknown-architecture": Breakage(surroundings=config(architectures=["NewForCausalLM"])),
    "unknown-model-type": Breakage(surroundings=config(model_type="newmodel", architectures=["NewForCausalLM"])),
    "remote-code": Breakage(
        surroundings=config(model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    ),
    "unknown-flag": Breakage(args=_args("--tensor-paralel", "2")),
    "bad-value": Breakage(args=_args("--max-num-seqs", "many")),
    "bad-quantization": Breakage(args=_args("--quantization", "awq")),
    "port-taken": Breakage(surroundings=port_taken),
    "worker-killed": Breakage(kill=("VLLM::Worker_TP", "rank 0 in world size|Starting to load model")),
    "engine-killed": Breakage(kill=("VLLM::EngineCor", "rank 0 in world size|Starting to load model")),
    "worker-segfault": Breakage(
        kill=("VLLM::Worker_TP", "rank 0 in world size|Starting to load model"), with_signal=signal.SIGSEGV
    ),
    "worker-killed-serving": Breakage(kill=("VLLM::Worker_TP", "Application startup complete")),
    "engine-killed-serving": Breakage(kill=("VLLM::EngineCor", "Application startup complete")),
    "memory-limit": Breakage(surroundings=limited(1500 * MIB)),
    "cache-disk-full": Breakage(
        tensor_parallel=1,
        args=COMPILED,
        env={
            "TORCH_COMPILE_DISABLE": "0",
            "VLLM_CACHE_ROOT": "/mnt/cache",
            "TORCHINDUCTOR_CACHE_DIR": "/mnt/cache/inductor",
        },
        surroundings=in_namespace("mkdir -p /mnt/cache && mount -t tmpfs -o size=64k tmpfs /mnt/cache"),
    ),
    "shm-small": Breakage(surroundings=in_namespace("mount -t tmpfs -o size=64k tmpfs /dev/shm")),
    "not-readable": Breakage(surroundings=not_ours),
    "no-compiler": Breakage(
        tensor_parallel=1,
        args=COMPILED,
        env={
            "TORCH_COMPILE_DISABLE": "0",
            "VLLM_CACHE_ROOT": str(WORK / "no-compiler"),
            "TORCHINDUCTOR_CACHE_DIR": str(WORK / "no-compiler/inductor"),
            "CXX": "/opt/none/g++",
        },
    ),
    "few-files": Breakage(surroundings=before("prlimit", "--nofile=40:40")),
    "gloo-interface": Breakage(env={"GLOO_SOCKET_IFNAME": "none0"}),
    "kv-too-small": Breakage(
        tensor_parallel=1, args=("--enforce-eager", "--max-model-len", "4096", "--kv-cache-memory-bytes", "1M")
    ),
    "kv-none": Breakage(
        tensor_parallel=1, args=("--enforce-eager", "--max-model-len", "256"), env={"VLLM_CPU_KVCACHE_SPACE": "4000"}
    ),
    "utilisation-tiny": Breakage(
        tensor_parallel=1, args=("--enforce-eager", "--max-model-len", "256", "--gpu-memory-utilization", "0.001")
    ),
}  # fmt: skip


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
