"""Starts of the real vLLM that are broken on purpose: what each is given, and what surrounds it (`tests.bench.make_excerpts`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench import surroundings as around
from tests.bench.surroundings import MIB, Change, Place, Surroundings
from tests.support.toy_model import Shape
from tests.support.toy_setup import ENGINE_ARGS, SMALL_ARGS

WORK: Final = Path("/var/tmp/mgpu-excerpts")
COMPILED: Final = SMALL_ARGS
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
