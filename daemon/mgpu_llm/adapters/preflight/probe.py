"""What the engine's own Python runs before the engine: do these GPUs compute, and does NCCL get through between them?

One file that imports nothing of ours and needs Python 3.9 and PyTorch; its arguments are a descriptor and the daemon's pid.
Commands come as lines of JSON on stdin, and answers go so to the descriptor: whatever prints on stdout disturbs nobody.

    {"start": GROUP, "role": "ranks" | "copies", "devices": [0, 1], "alone": true, "env": {...}, "meet": FILE}
    {"measure": GROUP}      {"kill": GROUP}      the end of stdin: kill all of them, wait for them, end

    {"is": "loaded"}   {"is": "unusable", "why": ...}   {"is": "killed", "group": GROUP}
    {"is": "died", "group": GROUP, "rank": RANK, "signal": 9}   {"is": STAGE, "group": GROUP, "rank": RANK, ...}

PyTorch is imported once, and CUDA is never touched here, so each group is only forked, and each rank of it is the first in its
process to load NCCL, which reads its environment once (NCCL 2.x, src/misc/param.cc).
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
#: How often the forked ones are looked after, and for how many bytes of one line a pipe is sure not to mix writers (POSIX).
LOOK_S = 0.05
WHOLE_BYTES = 4096
#: Elements of float32 by rank: NCCL sends few bytes otherwise than many (its protocols LL, LL128 and Simple).
SIZES = (256, 1 << 20)
#: 64 MiB, and how often.
MEASURED = 16 << 20
TIMES = 5
SIDE = 64
PATTERN = 1 << 16
#: No watchdog of PyTorch's may end a rank: who judges is not here.
NEVER = datetime.timedelta(days=1)
SHM = "/dev/shm/"  # noqa: S108 - where NCCL puts what ranks of one host share


class Asunder(Exception):  # noqa: N818 - what was found out, no fault of this program
    """What came back is not what was sent or computed."""


class Rank:
    """One forked process. All of it runs in there."""

    def __init__(self, torch: Any, told: int, order: dict[str, Any], rank: int, wake: int) -> None:
        self.torch, self.told, self.order, self.rank, self.wake = torch, told, order, rank, wake
        self.devices: list[int] = order["devices"]

    def say(self, what: str, **more: Any) -> None:
        say(self.told, {"is": what, "group": self.order["start"], "rank": self.rank, **more})

    def run(self) -> None:
        """Ends by being killed: a rank that went by itself would make the others fail too."""
        stage = "driver"
        try:
            count = self._count()
            if count <= max(self.devices):
                self.say("failed", stage=stage, kind="", why=f"CUDA sees {count} GPUs of {len(self.devices)}")
            else:
                for stage in self._copies() if self.order["role"] == "copies" else self._ranks():
                    self.say(stage)
        except Asunder as found:
            self.say("failed", stage=stage, kind="wrong", why=str(found))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
            self.say("failed", stage=stage, kind=type(error).__name__, why=shortened(str(error)))
        while os.read(self.wake, 1):
            pass
        os._exit(0)

    def _count(self) -> int:
        self.torch.cuda.init()
        return int(self.torch.cuda.device_count())

    def _ranks(self) -> Any:
        """Yields each stage as it begins."""
        device = f"cuda:{self.devices[self.rank]}"
        yield "context"
        self.torch.cuda.set_device(self.devices[self.rank])
        self.torch.zeros(1, device=device)
        self.torch.cuda.synchronize()
        if self.order["alone"]:
            yield "computing"
            self._alone(device)
        yield "alone"
        if len(self.devices) == 1:
            return
        distributed = self.torch.distributed
        store = distributed.FileStore(self.order["meet"], len(self.devices))
        distributed.init_process_group("nccl", store=store, rank=self.rank, world_size=len(self.devices), timeout=NEVER)
        yield "ready"
        for size in SIZES:
            self._all_reduce(device, size)
        yield "passed"
        if os.read(self.wake, 1):
            self.say("measured", gib_per_s=self._measure(device))

    def _alone(self, device: str) -> None:
        """Raises Asunder where a product or a copy is wrong."""
        torch = self.torch
        product = torch.full((SIDE, SIDE), 2.0, device=device) @ torch.full((SIDE, SIDE), 3.0, device=device)
        wrong = {value for row in product.cpu().tolist() for value in row} - {6.0 * SIDE}
        if wrong:
            raise Asunder(f"it computes {wrong.pop()} instead of {6.0 * SIDE}")
        sent = torch.arange(PATTERN)
        if sent.to(device).cpu().tolist() != sent.tolist():
            raise Asunder("what is copied to it and back is not what was sent")

    def _all_reduce(self, device: str, size: int) -> None:
        summed = self.torch.full((size,), float(self.rank + 1), device=device)
        self.torch.distributed.all_reduce(summed)
        self.torch.cuda.synchronize()
        right = len(self.devices) * (len(self.devices) + 1) / 2
        low, high = float(summed.min()), float(summed.max())
        if not low == high == right:
            raise Asunder(f"an all-reduce of {size} numbers gives {low} to {high}, not {right}")

    def _measure(self, device: str) -> float:
        """GiB/s of one rank's tensor, of a smaller one where there is no memory for the large one."""
        try:
            tensor = self.torch.full((MEASURED,), 0.0, device=device)
        except RuntimeError:
            tensor = self.torch.full((SIZES[-1],), 0.0, device=device)
        self.torch.distributed.all_reduce(tensor)
        self.torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(TIMES):
            self.torch.distributed.all_reduce(tensor)
        self.torch.cuda.synchronize()
        took_s = time.perf_counter() - began
        return TIMES * float(tensor.numel()) * 4 / (1 << 30) / took_s

    def _copies(self) -> Any:
        """From each to each, one after the other: "copying" before, "copied" with what was found after."""
        cuda = self.torch.cuda
        yield "context"
        sent = self.torch.arange(PATTERN)
        placed = {device: sent.to(f"cuda:{device}") for device in self.devices}
        for source in self.devices:
            for target in self.devices:
                if source != target:
                    direct = bool(cuda.can_device_access_peer(target, source))
                    pair = {"source": source, "target": target, "direct": direct}
                    self.say("copying", **pair)
                    came = placed[source].to(f"cuda:{target}")
                    cuda.synchronize(target)
                    right = came.cpu().tolist() == sent.tolist()
                    self.say("copied", right=right, **pair)
        yield "passed"


class Parent:
    """Forks, kills and waits; says what became of them."""

    def __init__(self, torch: Any, told: int) -> None:
        self.torch, self.told = torch, told
        #: By pid: group, rank, and the pipe by which it is woken.
        self.ranks: dict[int, tuple[str, int, int]] = {}
        #: By group that is being killed: what its ranks shared.
        self.left: dict[str, set[Path]] = {}

    def run(self) -> None:
        buffered = b""
        while True:
            readable, _, _ = select.select([0], [], [], LOOK_S)
            if readable:
                came = os.read(0, 1 << 16)
                if not came:
                    break
                *lines, buffered = (buffered + came).split(b"\n")
                for line in lines:
                    self._do(json.loads(line))
            self._wait(os.WNOHANG)
        for group in {group for group, _, _ in self.ranks.values()}:
            self._kill(group)
        self._wait(0)

    def _do(self, order: dict[str, Any]) -> None:
        if "start" in order:
            for rank in range(len(order["devices"]) if order["role"] == "ranks" else 1):
                self._fork(order, rank)
        elif "kill" in order:
            self._kill(order["kill"])
        else:
            for pid in self._members(order["measure"]):
                os.write(self.ranks[pid][2], b"!")

    def _members(self, group: str) -> list[int]:
        return [pid for pid, (name, _, _) in self.ranks.items() if name == group]

    def _fork(self, order: dict[str, Any], rank: int) -> None:
        asleep, wake = os.pipe()
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(asleep)
            os.close(wake)
            say(self.told, {"is": "unusable", "why": f"cannot fork: {error.strerror or error}"})
            return
        if pid:
            os.close(asleep)
            self.ranks[pid] = (order["start"], rank, wake)
            return
        try:
            die_with(parent)
            for _, _, other in self.ranks.values():
                os.close(other)
            os.close(wake)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(order["env"])
            self.torch.set_num_threads(1)
            Rank(self.torch, self.told, order, rank, asleep).run()
        finally:
            os._exit(1)

    def _kill(self, group: str) -> None:
        """Told as killed once all of it is gone, and with it its memory on the GPUs and what it shared in /dev/shm."""
        members = self._members(group)
        self.left.setdefault(group, set()).update(path for pid in members for path in shared(pid))
        for pid in members:
            os.kill(pid, signal.SIGKILL)
        self._bury(group)

    def _bury(self, group: str) -> None:
        if self._members(group):
            return
        for path in self.left.pop(group):
            with contextlib.suppress(OSError):
                path.unlink()
        say(self.told, {"is": "killed", "group": group})

    def _wait(self, options: int) -> None:
        """With WNOHANG for those that have ended, else for all."""
        while self.ranks:
            pid, status = os.waitpid(-1, options)
            if not pid:
                return
            group, rank, wake = self.ranks.pop(pid)
            os.close(wake)
            if group in self.left:
                self._bury(group)
            else:
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                say(self.told, {"is": "died", "group": group, "rank": rank, "signal": number})


def shared(pid: int) -> set[Path]:
    """What it has mapped of NCCL's in /dev/shm: whoever made it removes it, but not once it is killed."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    paths = {line.split(None, 5)[5] for line in mapped if SHM + "nccl-" in line}
    return {Path(path) for path in paths if path.startswith(SHM) and not path.endswith(" (deleted)")}


def shortened(text: str) -> str:
    """In one line; of NCCL's errors what counts comes last."""
    words = " ".join(text.split())
    return words if len(words) <= 600 else words[:300] + " ... " + words[-300:]


def say(told: int, message: dict[str, Any]) -> None:
    """One write each, so that those of several processes do not mix. Where nobody listens any more, we are to end anyway."""
    with contextlib.suppress(BrokenPipeError):
        os.write(told, json.dumps(message).encode()[: WHOLE_BYTES - 1] + b"\n")


def die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    told, daemon = int(sys.argv[1]), int(sys.argv[2])
    die_with(daemon)
    try:
        import torch
        import torch.distributed
    except BaseException as error:  # noqa: BLE001 - whatever keeps PyTorch from loading, it is told
        say(told, {"is": "unusable", "why": shortened(f"cannot import torch: {error}")})
        return
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        say(told, {"is": "unusable", "why": f"this PyTorch ({torch.__version__}) has no NCCL"})
        return
    say(told, {"is": "loaded"})
    Parent(torch, told).run()


if __name__ == "__main__":
    main()
