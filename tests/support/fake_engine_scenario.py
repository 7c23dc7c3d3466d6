"""What the fake engine is to do wrong, told by one environment variable.

FAKE_ENGINE is made of parts joined by ";", each an option (`name=value`) or a fault
(`name`, `name=value`), a fault perhaps followed by ` unless CONDITION`: then it is cured where the condition holds.

    FAKE_ENGINE="load_s=2; hang-init unless NCCL_P2P_DISABLE=1; oom unless utilisation<=0.8"

Conditions: VARIABLE=value (environment), utilisation<=X, tp<=N, attempt>=N, an argument such as --enforce-eager.
Options
    load_s=1.0            seconds from the start to serving
    log=cuda | cpu        whose words: vLLM 0.26 on two GPUs, or 0.32 on CPU
    task=generate | embed what the model can do
Faults while loading
    hang-boot             before the first line
    hang-init[=spin]      in the first collective: workers sleep, or use a tenth of a core each
    hang-weights          after the first shard
    chatter               with a hang: the lines that vLLM prints once a minute, once a second
    oom, gpu-not-free, no-cache-blocks      a worker fails with vLLM's words; exit status 1
    bad-flag, missing-model                 refused by vLLM; exit status 2, 1
    exit=N                ends with this status after an ERROR line
    sigkill               the API server kills itself with SIGKILL in mid-load
    worker-dies           a worker is killed in mid-load
    flood=MB              a worker prints so many MB of NCCL lines as fast as it can
Faults of the processes
    ignore-sigterm        no process minds SIGTERM
    grandchildren=N       so many processes that left session, group and parent; they sleep for ever
Faults while serving
    exit-serving=S        ends with status 0 after S seconds of serving, as vLLM does when its engine dies
    worker-dies-serving=S a worker is killed after S seconds; the API server follows with status 0
    unhealthy=S           /health says 503 after S seconds
    mute-completion       requests are taken and never answered, /health stays 200
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

#: The last line before each hang or failure, by a piece of its text: the first that the log has.
INIT = ("vLLM is using nccl", "world_size=2 rank=1")
FIRST_SHARD = ("| 1/4 ", "| 0/3 ")
LOADED = ("Model loading took", "Loading weights took")
STOPS: dict[str, tuple[str, ...]] = {
    "hang-boot": (),
    "hang-init": INIT,
    "hang-weights": FIRST_SHARD,
    "oom": LOADED,
    "gpu-not-free": INIT,
    "no-cache-blocks": LOADED,
    "exit": INIT,
    "sigkill": FIRST_SHARD,
    "worker-dies": FIRST_SHARD,
}
WORKER_ERRORS = {
    "oom": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 260.00 MiB. GPU 0 has a total capacity of "
    "139.80 GiB of which 120.44 MiB is free.",
    "gpu-not-free": "ValueError: Free memory on device cuda:1 (107.83/139.8 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 125.82 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    "no-cache-blocks": "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` "
    "when initializing the engine.",
}
#: Every fault by name; those that are not in STOPS let the load come to its end.
FAULTS = {
    *STOPS,
    "chatter",
    "bad-flag",
    "missing-model",
    "flood",
    "ignore-sigterm",
    "grandchildren",
    "exit-serving",
    "worker-dies-serving",
    "unhealthy",
    "mute-completion",
}


class Scenario(NamedTuple):
    """Options and the faults that are not cured, by name."""

    options: dict[str, str]
    faults: dict[str, str]

    @property
    def stop(self) -> str:
        """The fault that ends the load before its time, or ""."""
        return next((name for name in STOPS if name in self.faults), "")

    def number(self, fault: str) -> float | None:
        return float(self.faults[fault]) if fault in self.faults else None


def parse_scenario(text: str, args: argparse.Namespace) -> Scenario:
    options = {"load_s": "1.0", "log": "cuda", "task": "generate"}
    faults: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        fault, _, condition = part.partition(" unless ")
        name, _, value = fault.strip().partition("=")
        if name in options:
            options[name] = value
        elif name not in FAULTS:
            raise SystemExit(f"FAKE_ENGINE: unknown part {part!r}")
        elif not condition or not holds(condition.strip(), args):
            faults[name] = value
    return Scenario(options, faults)


def holds(condition: str, args: argparse.Namespace) -> bool:
    if condition.startswith("--"):
        return condition in sys.argv
    if condition.startswith("utilisation<="):
        return bool(args.gpu_memory_utilization <= float(condition.partition("<=")[2]) + 1e-9)
    if condition.startswith("tp<="):
        return bool(args.tensor_parallel_size <= int(condition.partition("<=")[2]))
    if condition.startswith("attempt>="):
        attempt = os.environ.get("MGPU_LLM_ENGINE", "::").split(":")[1]
        return int(attempt or 1) >= int(condition.partition(">=")[2])
    name, _, value = condition.partition("=")
    return os.environ.get(name) == value
