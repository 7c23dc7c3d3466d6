"""The series of the hardware bench: which lives make one, and what is done to the engine meanwhile."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.gpus import Gpu
from mgpu_llm.core.preflight import When
from tests.bench.gpu_scenarios import RIVAL, RIVAL_BYTES
from tests.bench.hardware_life import Bench, Daemon, Wanted, alone, under_mgpud
from tests.bench.hardware_watch import held_now, in_shared_memory, leftovers

#: Names of lives: who starts the engine, and with which preflight.
ALONE: Final = "alone"
OVERLAP: Final = f"mgpud-{When.OVERLAP}"
OFF: Final = f"mgpud-{When.OFF}"
#: Of the time that is left, what the end of a life may cost.
END_S: Final = 12.0
#: A life that would have less is left out.
LEAST_S: Final = 20.0
KILL_AT_PERCENT: Final = 50.0
SEED_UTILISATION: Final = 0.95
#: The screens that are kept of the seed's case: once each of these has been said.
SCREENS: Final = (
    "engine.starting",
    "preflight.failed",
    "engine.averted",
    "engine.stalled",
    "engine.phase phase=weights",
    "engine.ready",
)
RIVAL_UP_S: Final = 90.0
#: How long a start may try its way around the other user.
TAKEN_S: Final = 300.0


@dataclass
class Campaign:
    """What a series works with: it runs lives one after another, and everything it learns goes to `add` at once."""

    bench: Bench
    until: float
    repeat: int
    alone_limit_s: float
    warm_up: bool
    with_off: bool
    meanwhile: str
    add: Callable[[str, dict[str, Any]], None]
    took_s: dict[tuple[str, str], float] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def left_s(self) -> float:
        return self.until - time.monotonic()

    def live(
        self,
        series: str,
        kind: str,
        *,
        fault: str = "",
        limit_s: float = 600.0,
        counts: bool = True,
        meanwhile: Callable[[Daemon], None] = lambda _: None,
        utilisation: float | None = None,
        home: Path | None = None,
        needed_s: float = 0.0,
    ) -> dict[str, Any] | None:
        """One life with what it left, None where too little time was left, which is noted instead. In `home` it finds what
        an earlier life has remembered; otherwise it has a folder of its own."""
        name = f"{next(self.numbers):02d}-{series}-{kind}"
        needed_s = needed_s or self._needed_s(kind, fault)
        if self.left_s() - END_S < needed_s:
            why = f"{self.left_s():.0f} s were left, and it takes {needed_s:.0f} s and more"
            self.add("not_run", {"series": series, "kind": kind, "fault": fault, "why": why})
            return None
        preflight = "" if kind == ALONE else kind.removeprefix("mgpud-")
        wanted = Wanted(name=name, preflight=preflight, fault=fault, utilisation=utilisation)
        limit_s, began = min(limit_s, self.left_s() - END_S), time.monotonic()
        with nullcontext(str(home)) if home else _folder() as folder:
            told, left = self._run(wanted, Path(folder), limit_s, meanwhile)
        self.took_s[kind, fault] = time.monotonic() - began
        row = {
            "series": series,
            "kind": kind,
            "fault": fault,
            "counts": counts,
            "limit_s": round(limit_s),
            "left": left,
        }
        row["utilisation"] = utilisation or self.bench.utilisation
        self.add("lives", {"name": name, **row, **told})
        return told

    def _needed_s(self, kind: str, fault: str) -> float:
        """As long as such a life took, or else as any took that nothing was done to."""
        unharmed = (took_s for (_, fault), took_s in self.took_s.items() if not fault)
        return max(LEAST_S, self.took_s.get((kind, fault)) or max(unharmed, default=0.0))

    def _run(
        self, wanted: Wanted, folder: Path, limit_s: float, meanwhile: Callable[[Daemon], None]
    ) -> tuple[dict[str, Any], dict[str, object]]:
        """What came of a life, and what it left; that is cleared away however it ends."""
        cards, shared = self.bench.cards, in_shared_memory()
        before = held_now(cards)
        try:
            if not wanted.preflight:
                told = alone(self.bench, wanted, folder, limit_s)
            else:
                told = under_mgpud(self.bench, wanted, folder, before, limit_s, meanwhile)
                _keep(folder / "state", self.bench.out / f"{wanted.name}-state")
        finally:
            left = leftovers(cards, before, shared)
        return told, left


def _folder() -> tempfile.TemporaryDirectory[str]:
    """A new one; that something in it cannot be removed is no reason to lose what was measured."""
    return tempfile.TemporaryDirectory(prefix="mgpu-hw-", ignore_cleanup_errors=True)


def _keep(state: Path, to: Path) -> None:
    """Its recordings and incidents."""
    with suppress(OSError, shutil.Error):
        shutil.copytree(state, to, dirs_exist_ok=True)


def healthy(campaign: Campaign) -> None:
    """vLLM alone and under mgpud in turn, each pair the other way round than the one before."""
    kinds = [ALONE, OVERLAP, *([OFF] if campaign.with_off else [])]
    if campaign.warm_up:
        campaign.live("healthy", OVERLAP, counts=False)
    for _ in range(campaign.repeat):
        for kind in kinds:
            if campaign.live("healthy", kind) is None:
                return
        kinds.reverse()


def hang_overlap(campaign: Campaign) -> None:
    """Peer-to-peer is broken and the GPUs are checked beside the load."""
    campaign.live("p2p-hang", OVERLAP, fault="p2p-hang")


def hang_off(campaign: Campaign) -> None:
    """Peer-to-peer is broken and nothing is checked: the stall must show."""
    campaign.live("p2p-hang", OFF, fault="p2p-hang")


def hang_alone(campaign: Campaign) -> None:
    """Peer-to-peer is broken and nobody looks after vLLM. Beside it `--meanwhile` may run, which must leave the GPUs alone."""
    beside = subprocess.Popen(shlex.split(campaign.meanwhile)) if campaign.meanwhile else None
    campaign.live("p2p-hang", ALONE, fault="p2p-hang", limit_s=campaign.alone_limit_s, needed_s=campaign.alone_limit_s)
    if beside is not None:
        with suppress(subprocess.TimeoutExpired):
            beside.wait(max(0.0, campaign.left_s()))


def hang_again(campaign: Campaign) -> None:
    """Peer-to-peer is broken twice: the second start knows from the first what served."""
    with tempfile.TemporaryDirectory(prefix="mgpu-hw-") as home:
        for _ in range(2):
            campaign.live("p2p-hang-again", OVERLAP, fault="p2p-hang", home=Path(home))


def custom_all_reduce(campaign: Campaign) -> None:
    """Rank 1 sleeps in vLLM's own all-reduce: a stall in warm-up, which no check of NCCL foresees."""
    campaign.live("custom-all-reduce-hang", OVERLAP, fault="custom-all-reduce-hang")


def hang(campaign: Campaign) -> None:
    """All three."""
    hang_overlap(campaign)
    hang_off(campaign)
    hang_alone(campaign)


def taken(campaign: Campaign) -> None:
    """Another process has 30 GB of the last GPU before the engine starts."""
    cards = campaign.bench.cards
    if not cards:
        campaign.add("not_run", {"series": "taken", "kind": OVERLAP, "fault": "", "why": "there are no GPUs"})
        return
    with rival(campaign.bench, cards[-1]) as held:
        campaign.add("notes", {"series": "taken", "text": held})
        campaign.live("taken", OVERLAP, limit_s=TAKEN_S)


@contextmanager
def rival(bench: Bench, card: Gpu) -> Iterator[str]:
    """Another user of a GPU, and how much it has taken. Raises RuntimeError where it does not come up."""
    env = {**os.environ, **bench.env, "CUDA_VISIBLE_DEVICES": str(card.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with tempfile.NamedTemporaryFile() as go, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([bench.python, "-c", RIVAL, go.name, str(RIVAL_BYTES)], env=env, stdout=said)
        try:
            give_up_at = time.monotonic() + RIVAL_UP_S
            while not (text := _text(said.fileno())).endswith("\n"):
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError(
                        f"the other user of GPU {card.index} did not come up, exit status {process.poll()}"
                    )
                time.sleep(0.1)
            yield text.strip()
        finally:
            process.kill()
            process.wait()


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 4096, 0).decode("utf-8", "replace")


def worker_killed(campaign: Campaign) -> None:
    """The last worker gets SIGKILL once half of the weights is in."""
    killed: list[dict[str, Any]] = []

    def kill(daemon: Daemon) -> None:
        percent = daemon.status.get("weights_percent")
        if killed or percent is None or percent < KILL_AT_PERCENT:
            return
        workers = sorted(pid for pid in daemon.watch.engine() if "Worker" in _title(pid))
        if workers:
            os.kill(workers[-1], signal.SIGKILL)
            at_s = round(time.monotonic() - daemon.began, 2)
            phase = daemon.status.get("phase", "")
            killed.append({"pid": workers[-1], "at_s": at_s, "percent": percent, "phase": phase})

    came = campaign.live("worker-killed", OVERLAP, meanwhile=kill)
    text = "no worker was killed: half of the weights was never seen" if came is not None else ""
    for found in killed:
        when = f"after {found['at_s']} s, in {found['phase']}, at {found['percent']:.0f} % of the weights"
        text = f"worker {found['pid']} killed {when}"
    if text:
        campaign.add("notes", {"series": "worker-killed", "text": text})


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def seed(campaign: Campaign) -> None:
    """The case from which all this comes: a 72B model, two GPUs, utilisation 0.95, peer-to-peer broken; with what one sees."""
    shown = set[str]()

    def show(daemon: Daemon) -> None:
        for wanted in SCREENS:
            # A copy: the thread that reads goes on.
            said = any(line.startswith(wanted) for _, _, line in list(daemon.said.own))
            if said and wanted not in shown:
                shown.add(wanted)
                daemon.screen()

    campaign.live("seed", OVERLAP, fault="p2p-hang", meanwhile=show, utilisation=SEED_UTILISATION)


SERIES: Final[Mapping[str, Callable[[Campaign], None]]] = {
    "healthy": healthy,
    "p2p-hang": hang,
    "p2p-hang:overlap": hang_overlap,
    "p2p-hang:off": hang_off,
    "p2p-hang:alone": hang_alone,
    "p2p-hang:again": hang_again,
    "custom-all-reduce-hang": custom_all_reduce,
    "taken": taken,
    "worker-killed": worker_killed,
    "seed": seed,
}


def command() -> str:
    """The command line of this run."""
    return shlex.join(["python3", "-m", "tests.bench.hardware", *sys.argv[1:]])
