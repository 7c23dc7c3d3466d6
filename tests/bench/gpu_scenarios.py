"""The starts that `tests.bench.gpu_campaign` records: the real vLLM 0.26.0, tensor parallel 2, on two GPUs of one host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

WORK: Final = Path("/tmp/mgpu-campaign")
#: The other user of GPU 1 takes its memory when this file appears.
TAKE: Final = WORK / "take"
P2P_OFF: Final = {"NCCL_P2P_DISABLE": "1"}
#: The larger shape that two cards of so many bytes each hold, weights and graphs.
BIG: Final = (("72b", 120e9), ("32b", 60e9))
RIVAL_BYTES: Final = 30 * 10**9
#: Another user of GPU 1. It has its context early, so that it takes memory at once when the file appears; if so much is
#: no longer free it takes what there is.
RIVAL: Final = """
import os, sys, time, torch
held, left, piece = [torch.empty(1, device="cuda")], int(sys.argv[2]), int(sys.argv[2])
while not os.path.exists(sys.argv[1]):
    time.sleep(0.005)
while left > 0 and piece > 1 << 28:
    try:
        held.append(torch.empty(min(piece, left), dtype=torch.uint8, device="cuda"))
        left -= min(piece, left)
    except torch.OutOfMemoryError:
        piece //= 2
print(f"the other process took {(int(sys.argv[2]) - left) / 1e9:.1f} GB", flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One start. `takes_s` is what it is expected to take with all that belongs to it, `still_s` is set for those that never
    come to an end by themselves. `cold`: no compile cache, and no page of the weights in memory."""

    what: str
    takes_s: float
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: str = "7b"
    fault: str = ""
    still_s: float | None = None
    cold: bool = False
    rival: bool = False


def scenarios(card_bytes: float) -> Mapping[str, Scenario]:
    """All of them, by priority, for cards of that size."""
    big = next((model for model, needed in BIG if card_bytes >= needed), BIG[-1][0])
    forked = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    return {
        "tp2-cold-one-shard": Scenario(
            what="15.2 GB in one shard, neither in the page cache nor compiled before", takes_s=155, cold=True
        ),
        "tp2-p2p-hang-stacks": _broken("p2p-hang", "GPU 1 sleeps before the first all-reduce", 108),
        "tp2-custom-all-reduce-hang": _broken(
            "custom-all-reduce-hang", "GPU 1 sleeps before the first all-reduce of vLLM's own kernel", 134
        ),
        "tp2-rank-missing-stacks": _broken("rank-missing", "rank 1 leaves out its first all-reduce", 115),
        "tp2-worker-stopped": Scenario(
            what="rank 1 is stopped (SIGSTOP) when the capture of graphs begins",
            takes_s=125,
            fault="sigstop:Worker_TP1@Capturing CUDA graphs",
            still_s=40.0,
        ),
        "tp2-gpu-taken-for-cache": Scenario(
            what="another process takes 30 GB of GPU 1 just before the KV cache is allocated",
            takes_s=100,
            fault=f"run:touch {TAKE}@Available KV cache memory",
            still_s=40.0,
            rival=True,
        ),
        f"tp2-{big}-dummy-cold": Scenario(
            what=f"Qwen2.5-{big.upper()}'s shape, no weights to read, nothing compiled before",
            takes_s=140,
            args=("--load-format", "dummy"),
            model=big,
        ),
        "tp2-warm": Scenario(what="15.2 GB in one shard, in the page cache, compiled before", takes_s=95),
        "tp2-without-p2p-warm": Scenario(
            what="peer-to-peer off, forked workers",
            takes_s=100,
            args=("--disable-custom-all-reduce",),
            env={**P2P_OFF, **forked},
        ),
        "tp2-eager-warm": Scenario(
            what="nothing compiled, no graphs, forked workers", takes_s=60, args=("--enforce-eager",), env=forked
        ),
    }


def _broken(fault: str, what: str, takes_s: float) -> Scenario:
    return Scenario(what=what, takes_s=takes_s, env={"MGPU_FAULT": fault}, still_s=40.0)
