"""Record starts of the real vLLM 0.26.0 on two GPUs of one host, one after another, within a time budget.

    PYTHONPATH=SITE:daemon:. python3 -m tests.bench.gpu_campaign --out FOLDER --models FOLDER --budget S [NAME...]

The folder of models holds `7b`, a checkpoint of Qwen2.5-7B's shape in one shard, and `72b` and `32b`, configurations without
weights; random values do. What no longer fits into the budget is skipped, and the summary says so. After every start FOLDER
has recordings.tar and summary.txt, so that a campaign that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.gpus import Gpu, Gpus, GpusUnobserved
from mgpu_llm.core import recording
from tests.bench.gpu_scenarios import BIG, RIVAL, RIVAL_BYTES, TAKE, WORK, Scenario, scenarios
from tests.bench.quiet import load, quiet
from tests.bench.surroundings import drop_pages
from tests.support.toy_setup import ROOT, free_port

CACHE: Final = WORK / "cache"
SHM: Final = Path("/dev/shm")
#: Every process of a campaign has this in its environment.
MARK: Final = "BENCH_CAMPAIGN"
FAULT_PLUGIN: Final = ROOT / "tests/support/fault_plugin_cuda"
#: NVLink multicast can harm a host that others share; the rest needs packages that are not there.
ENGINE_ENV: Final[Mapping[str, str]] = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
    "TRITON_CACHE_DIR": str(CACHE / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
}
SERVE: Final = ("--max-model-len", "4096", "--gpu-memory-utilization", "0.9")
#: How long a start may take beyond what is expected, what its end may cost, and when GPUs count as idle again.
OVERTIME_S: Final = 90.0
END_S: Final = 12.0
IDLE_S: Final = 30.0
IDLE_WITHIN_BYTES: Final = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What is given to all of them."""

    out: Path
    models: Path
    gpus: tuple[Gpu, ...]
    python: str
    extra: tuple[str, ...]
    prefix: str
    rewrites: tuple[str, ...]

    def command(self, name: str, scenario: Scenario, port: int, limit_s: float) -> list[str]:
        """The recorder's command line."""
        given = ["--out", str(WORK / "recordings" / f"{self.prefix}{name}.jsonl.gz"), "--note", scenario.what]
        given += ["--url", f"http://127.0.0.1:{port}", "--limit", str(round(limit_s))]
        given += ["--gpus", ",".join(str(gpu.index) for gpu in self.gpus)] if self.gpus else []
        given += ["--still", str(scenario.still_s)] if scenario.still_s is not None else []
        given += ["--fault", scenario.fault] if scenario.fault else []
        places = (f"{self.models}=/srv/models", f"{CACHE}=/var/cache/vllm", f"{WORK}=/var/tmp", f"{ROOT}=/opt/mgpu-llm")
        given += [word for rewrite in (*self.rewrites, *places) for word in ("--rewrite", rewrite)]
        serve = [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.models / scenario.model)]
        serve += ["--served-model-name", scenario.model, "--host", "127.0.0.1", "--port", str(port)]
        serve += ["--tensor-parallel-size", "2", *SERVE, *scenario.args, *self.extra]
        return [sys.executable, "-m", "tests.bench.record_start", *given, "--", *serve]

    def env(self, scenario: Scenario) -> dict[str, str]:
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path += [str(FAULT_PLUGIN)] if "MGPU_FAULT" in scenario.env else []
        absolute = os.pathsep.join(str(Path(entry).resolve()) for entry in path if entry)
        return {**os.environ, **ENGINE_ENV, "PYTHONPATH": absolute, MARK: str(os.getpid()), **scenario.env}

    def record(self, name: str, scenario: Scenario, limit_s: float) -> str:
        """Record one start and clean up after it; returns the lines for the summary."""
        TAKE.unlink(missing_ok=True)
        before = _shared_memory()
        if scenario.cold:
            shutil.rmtree(CACHE, ignore_errors=True)
            drop_pages(self.models / scenario.model)
        command = self.command(name, scenario, free_port(), limit_s)
        began = time.monotonic()
        with self._rival() if scenario.rival else contextlib.nullcontext():
            # Its own limits end it; this is for the day on which they do not.
            recorder = subprocess.Popen(command, env=self.env(scenario), cwd=WORK, start_new_session=True)
            try:
                status = recorder.wait(limit_s + 60)
            except subprocess.TimeoutExpired:
                recorder.send_signal(signal.SIGTERM)
                status = recorder.wait()
        told = f"{name}: {_told(Path(command[command.index('--out') + 1]), status)}; {time.monotonic() - began:.0f} s"
        return told + "".join(f"\n  left behind: {what}" for what in _left(before))

    @contextlib.contextmanager
    def _rival(self) -> Iterator[None]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        rival = subprocess.Popen([self.python, "-c", RIVAL, str(TAKE), str(RIVAL_BYTES)], env=env)
        try:
            yield
        finally:
            rival.kill()
            rival.wait()

    def pack(self, summary: Sequence[str]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "summary.txt").write_text("".join(f"{line}\n" for line in summary))
        with tarfile.open(self.out / "recordings.tar", "w") as tar:
            tar.add(WORK / "recordings", arcname=".")


def _told(path: Path, status: int) -> str:
    try:
        taken = load(path)
        found = quiet(recording.events(taken))
    except (OSError, EOFError, recording.RecordingError) as error:
        return f"no recording, the recorder ended with {status}: {error}"
    return (
        f"{taken.ended_by or 'broken off'} at {taken.ended_at:.1f}, moved last at {found.last_moved_at:.1f}"
        f" ({', '.join(found.last_moved)}), longest quiet {found.longest_s:.1f} s until {found.until:.1f} in"
        f" {found.phase.label}, {path.stat().st_size / 1000:.0f} kB, last line: {(taken.lines or ('none',))[-1][:160]}"
    )


def _shared_memory() -> frozenset[str]:
    return frozenset(entry.name for entry in SHM.iterdir())


def _left(before: frozenset[str]) -> Iterator[str]:
    """What a start left behind although it was cleaned up after. Processes are killed; files may be somebody else's."""
    for pid in (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):
            if (
                int(pid) != os.getpid()
                and f"\0{MARK}={os.getpid()}\0".encode() in Path("/proc", pid, "environ").read_bytes()
            ):
                yield f"process {pid} ({Path('/proc', pid, 'comm').read_text().strip()})"
                os.kill(int(pid), signal.SIGKILL)
    yield from (str(SHM / name) for name in sorted(_shared_memory() - before))


async def _used(gpus: Gpus, cards: Sequence[Gpu]) -> list[int]:
    return [reading.memory_used_bytes for reading in await gpus.read([card.uuid for card in cards], 10)]


async def _wait_until_idle(gpus: Gpus, cards: Sequence[Gpu], idle: Sequence[int]) -> str:
    """Why the GPUs are not as they were before the first start, "" once they are."""
    give_up_at = time.monotonic() + IDLE_S
    while True:
        try:
            held = [now - then for now, then in zip(await _used(gpus, cards), idle, strict=True)]
        except GpusUnobserved as silence:
            return silence.reason
        if max(held, default=0) <= IDLE_WITHIN_BYTES:
            return ""
        if time.monotonic() > give_up_at:
            return f"the GPUs still hold {', '.join(f'{extra / 1e9:.2f}' for extra in held)} GB more than at first"
        await asyncio.sleep(0.2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where recordings.tar and summary.txt go")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds for all of them")
    parser.add_argument("--gpus", choices=("two", "none"), default="two", help="none: a rehearsal on a CPU build")
    parser.add_argument("--python", default="python3", help="the engine's, default %(default)s")
    parser.add_argument("--extra", default="", help="further arguments of every engine, in one text")
    parser.add_argument(
        "--rewrite", action="append", default=[], metavar="FROM=TO", help="in every row; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("names", nargs="*", metavar="NAME", help="without: all")
    return parser.parse_args()


async def run(given: argparse.Namespace) -> list[str]:
    """Run them; returns the summary, of which each line is printed as it comes."""
    deadline = time.monotonic() + given.budget
    gpus, cards = Gpus(), tuple[Gpu, ...]()
    if given.gpus == "two":
        cards = (await gpus.inventory(60))[:2]
    table = scenarios(min((card.memory_total_bytes for card in cards), default=0))
    card = re.search(r"[A-Z]+\d+\w*", cards[0].name) if cards else None
    campaign = Campaign(
        out=given.out,
        models=given.models.resolve(),
        gpus=cards,
        python=given.python,
        extra=tuple(shlex.split(given.extra)),
        prefix=f"{card[0].lower()}-" if card else "rehearsal-",
        rewrites=(*given.rewrite, *(f"{gpu.uuid}=GPU-{gpu.index}" for gpu in cards)),
    )
    (WORK / "recordings").mkdir(parents=True, exist_ok=True)
    idle = await _used(gpus, cards) if cards else []
    summary = [f"on {', '.join(gpu.name for gpu in cards) or 'no GPU'}"]
    print(summary[0], flush=True)
    for name in given.names or table:
        left_s = deadline - time.monotonic()
        scenario = table.get(name)
        if scenario is None:
            told = f"{name}: skipped, it is not for these cards"
        elif given.dry_run:
            told = f"{name}: {shlex.join(campaign.command(name, scenario, 8000, scenario.takes_s + OVERTIME_S))}"
        elif left_s < scenario.takes_s:
            told = f"{name}: skipped, it takes about {scenario.takes_s:.0f} s and {left_s:.0f} s are left"
        else:
            limit_s = min(scenario.takes_s + OVERTIME_S, left_s - END_S)
            told = await asyncio.to_thread(campaign.record, name, scenario, limit_s)
        print(told, flush=True)
        summary.append(told)
        if not given.dry_run:
            if trouble := await _wait_until_idle(gpus, cards, idle):
                summary.append(f"stopped here: {trouble}")
                print(summary[-1], flush=True)
            campaign.pack(summary)
            if trouble:
                break
    return summary


def main() -> int:
    given = _arguments()
    known = {name for size in (0.0, *(needed for _, needed in BIG)) for name in scenarios(size)}
    if unknown := [name for name in given.names if name not in known]:
        print(f"there is no scenario {', '.join(unknown)}; there are {', '.join(sorted(known))}", file=sys.stderr)
        return os.EX_USAGE
    asyncio.run(run(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
