"""Record the starts of tests/data/recordings/cpu-*.jsonl.gz anew: real starts of the real vLLM on this machine's CPU.

    python -m tests.bench.make_cpu_corpus [--out FOLDER] [NAME...]

Needs root, `make dev`, cgroup v1 and about 3 GB below /var/tmp. All of them take about an hour.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench import surroundings as around
from tests.bench.surroundings import MIB, Change, Place, Surroundings
from tests.support.toy_model import Shape, write_toy_model
from tests.support.toy_setup import ENGINE_ARGS, ENGINE_ENV, ENGINE_PYTHON, ROOT, SMALL_ARGS, free_port

WORK: Final = Path("/var/tmp/mgpu-corpus")
RECORDINGS: Final = ROOT / "tests/data/recordings"
#: Where things seem to lie in a recording: not where its maker has them.
REWRITES: Final = {
    str(WORK / "models"): "/srv/models",
    str(WORK / "run/disk"): "/srv/models",
    str(WORK / "run/network"): "/srv/models/toy",
    str(WORK / "run/toy"): "/srv/models/toy",
    str(WORK): "/var/lib/vllm",
    str(ENGINE_PYTHON.parents[1].resolve()): "/opt/vllm",
    str(ENGINE_PYTHON.parents[1]): "/opt/vllm",
    str(ENGINE_PYTHON.parents[1].resolve().parent): "/opt/mgpu-llm",
    str(ROOT): "/opt/mgpu-llm",
    str(ENGINE_PYTHON.resolve().parents[1]): "/usr",
}
BIG: Final = {"hidden": 1024, "intermediate": 4096, "layers": 18, "heads": 8, "kv_heads": 2}
MODELS: Final = {"toy": Shape(), "one-shard": Shape(**BIG, shards=1), "nine-shards": Shape(**BIG, shards=9)}
COMPILED: Final = SMALL_ARGS
COMPILING: Final = {"TORCH_COMPILE_DISABLE": "0"}
SILENT: Final = (*ENGINE_ARGS, "--no-use-tqdm-on-load", "--uvicorn-log-level", "error")
CACHE: Final = WORK / "cache"
COMPILE_CACHE: Final = WORK / "compile-cache"
FIRST_SHARD: Final = "checkpoint shards: +0%"
STILL_S: Final = 75.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One start. `still_s` is set for those that never come to an end by themselves. `cache` is vLLM's and the compilers'."""

    model: str = "toy"
    tensor_parallel: int = 2
    args: tuple[str, ...] = ENGINE_ARGS
    env: Mapping[str, str] = field(default_factory=dict)
    surroundings: Surroundings = around.ordinary
    fault: str = ""
    still_s: float | None = None
    limit_s: float = 300.0
    cache: Path = CACHE
    empty_cache: bool = False


def _fault(name: str, **more: str) -> dict[str, str]:
    return {"MGPU_FAULT": name, **more}


SCENARIOS: Final[Mapping[str, Scenario]] = {
    # -- healthy --
    "cpu-tp2-slow-disk": Scenario(model="one-shard", surroundings=around.slow_disk(8 * MIB)),
    "cpu-tp2-cold-cache": Scenario(model="nine-shards", surroundings=around.cold_cache),
    "cpu-tp1-compile": Scenario(tensor_parallel=1, args=COMPILED, env=COMPILING, cache=COMPILE_CACHE, empty_cache=True),
    "cpu-tp1-compile-busy-cores": Scenario(
        tensor_parallel=1,
        args=COMPILED,
        env=COMPILING,
        cache=WORK / "other-compile-cache",
        empty_cache=True,
        surroundings=around.busy_cores(4),
        limit_s=590.0,
    ),
    "cpu-tp1-eager": Scenario(tensor_parallel=1),
    "cpu-tp2-busy-cores": Scenario(surroundings=around.busy_cores(4), limit_s=400.0),
    "cpu-tp2-little-memory": Scenario(model="one-shard", surroundings=around.little_memory(2300 * MIB)),
    "cpu-tp2-paused": Scenario(
        model="nine-shards", surroundings=around.cold_cache, fault=f"sigstop-for:5:Worker_TP1@{FIRST_SHARD}"
    ),
    "cpu-tp2-long-pause": Scenario(
        model="nine-shards", surroundings=around.cold_cache, fault=f"sigstop-for:12:Worker_TP1@{FIRST_SHARD}"
    ),
    "cpu-tp2-says-nothing": Scenario(args=SILENT, env={"VLLM_LOGGING_LEVEL": "ERROR"}),
    # -- stalls --
    "cpu-tp2-p2p-hang": Scenario(env=_fault("p2p-hang"), still_s=STILL_S),
    "cpu-tp2-rank-missing": Scenario(env=_fault("rank-missing"), still_s=STILL_S),
    "cpu-tp2-says-nothing-rank-missing": Scenario(
        args=SILENT, env=_fault("rank-missing", VLLM_LOGGING_LEVEL="ERROR"), still_s=STILL_S
    ),
    "cpu-tp2-hang-warm-up": Scenario(env=_fault("hang-warm-up", VLLM_RINGBUFFER_WARNING_INTERVAL="5"), still_s=STILL_S),
    "cpu-tp2-spin-in-warm-up": Scenario(env=_fault("spin-in-warm-up"), still_s=STILL_S),
    "cpu-tp2-frozen-worker": Scenario(
        model="nine-shards", surroundings=around.cold_cache, fault=f"sigstop:Worker_TP1@{FIRST_SHARD}", still_s=STILL_S
    ),
    "cpu-tp2-pipe-for-a-shard": Scenario(surroundings=around.pipe_for_a_shard, still_s=STILL_S),
    "cpu-tp2-lost-disk": Scenario(surroundings=around.lost_disk(1_200_000), still_s=STILL_S),
    "cpu-tp2-stopped-disk": Scenario(
        model="one-shard",
        surroundings=around.slow_disk(40 * MIB, stops_after_s=4),
        fault=f"run:RUN@{FIRST_SHARD}",
        still_s=STILL_S,
    ),
    "cpu-tp2-stale-jit-lock": Scenario(surroundings=around.stale_baton, env=_fault("jit-lock"), still_s=STILL_S),
    "cpu-tp1-held-compile-lock": Scenario(
        tensor_parallel=1,
        args=COMPILED,
        env=COMPILING,
        cache=COMPILE_CACHE,
        surroundings=around.held_compile_locks(COMPILE_CACHE),
        still_s=STILL_S,
    ),
    # -- crashes --
    "cpu-tp2-cut-shard": Scenario(surroundings=around.cut_shard),
    "cpu-tp2-missing-shard": Scenario(surroundings=around.missing_shard),
    "cpu-tp2-out-of-memory": Scenario(model="one-shard", surroundings=around.little_memory(1800 * MIB)),
    "cpu-tp2-killed-worker": Scenario(
        model="nine-shards", surroundings=around.slow_disk(40 * MIB), fault=f"sigkill:Worker_TP1@{FIRST_SHARD}"
    ),
}


def record(name: str, out: Path) -> int:
    """Record one scenario into `out`/NAME.jsonl.gz; returns the recorder's exit status."""
    scenario = SCENARIOS[name]
    model = WORK / "models" / scenario.model
    write_toy_model(model, MODELS[scenario.model])
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if scenario.empty_cache:
        shutil.rmtree(scenario.cache, ignore_errors=True)
    with scenario.surroundings(Place(folder=folder, model=model)) as change:
        return subprocess.run(
            _recorder(scenario, change, out / f"{name}.jsonl.gz"), cwd=folder, env=_env(scenario, change), check=False
        ).returncode


def _recorder(scenario: Scenario, change: Change, out: Path) -> list[str]:
    port = free_port()
    given = ["--out", str(out), "--url", f"http://127.0.0.1:{port}", "--limit", str(scenario.limit_s)]
    given += ["--still", str(scenario.still_s)] if scenario.still_s is not None else []
    given += ["--fault", scenario.fault.replace("RUN", change.run)] if scenario.fault else []
    given += [word for old, new in REWRITES.items() for word in ("--rewrite", f"{old}={new}")]
    serve = [str(ENGINE_PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(change.model)]
    serve += ["--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(port)]
    serve += ["--tensor-parallel-size", str(scenario.tensor_parallel), *scenario.args]
    return [sys.executable, "-m", "tests.bench.record_start", *given, "--", *change.before, *serve]


def _env(scenario: Scenario, change: Change) -> dict[str, str]:
    own = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if scenario.tensor_parallel == 2 else "0-1"}
    where = {"VLLM_CACHE_ROOT": str(scenario.cache), "TORCHINDUCTOR_CACHE_DIR": str(scenario.cache / "inductor")}
    return {
        **own,
        "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}",
        **ENGINE_ENV,
        **binding,
        **where,
        **scenario.env,
        **change.env,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORDINGS, help="default %(default)s")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; all without")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in SCENARIOS]:
        parser.error(f"there is no scenario {', '.join(unknown)}")
    failed = list[str]()
    for name in given.names or SCENARIOS:
        print(f"{name} ...", flush=True)
        if record(name, given.out.resolve()):
            failed.append(name)
    if failed:
        print(f"not recorded: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
