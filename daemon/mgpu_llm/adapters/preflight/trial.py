"""One group of the probe's processes, what each has said, and what that means. Seconds are those that the examination lived."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

#: As the stages of the probe are called: before these nothing has been asked of a GPU, and of NCCL.
ON_ONE_GPU: Final = ("context", "computing")
BETWEEN_GPUS: Final = ("ready", "passed")
#: Whose fault these are is not the transport's: no memory, or somebody has the GPU for himself (nvidia-smi -c EXCLUSIVE_PROCESS).
#: cuBLAS says "not initialised" where it finds no memory for itself (CUBLAS_STATUS_NOT_INITIALIZED, PyTorch's forums and issues).
_NOBODYS: Final = re.compile(
    r"out of memory|cannot allocate memory|busy or unavailable|re-initialize CUDA|invalid device ordinal|no CUDA-capable"
    r"|CUBLAS_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)|system not yet initialized|driver version is insufficient"
    r"|driver/library version mismatch|forward compatibility|too many open files"
    r"|resource temporarily unavailable"
    # A /dev/shm that is too small: the engine says so itself, and what cures it is no other transport.
    r"|no space left|shared memory segment|failed to extend /dev/shm",
    re.IGNORECASE,
)
_OF_A_GPU: Final = re.compile(r"CUDA error|CUDA driver error|CUBLAS_STATUS_|cuDNN", re.IGNORECASE)
_OF_NCCL: Final = re.compile(r"NCCL|CUDA error|CUDA driver error|Cuda failure")
_NUMBERS: Final = re.compile(r"\b(?:0x)?[0-9a-f]*\d[0-9a-f]*\b|/dev/shm/\S+")
_LAST_WORD: Final = re.compile(r"(?P<code>nccl[A-Z]\w+):.*?Last error: (?P<why>.+)")
#: Deaths of its own making. Any other was somebody's doing: the kernel's without memory, also in /dev/shm (SIGBUS), an admin's.
_CRASHES: Final = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class Failure(NamedTuple):
    """`proven`: it says something of the GPUs, or of what is between them. `raised`: an engine would be told the same."""

    stage: str
    why: str
    proven: bool
    raised: bool = False


@dataclass(kw_only=True)
class Trial:
    """`devices` are the indices of its GPUs; rank N is on the Nth. When one rank has failed, the others have `settled_s` to say
    what they know: NCCL's ranks say that a peer has gone before that peer says why it went."""

    name: str
    devices: tuple[int, ...]
    begun_at: float
    settled_s: float = 1.0
    words_at: float | None = None
    ready_at: float | None = None
    passed_at: float | None = None
    failed_at: float | None = None
    stages: dict[int, str] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    gib_per_s: list[float] = field(default_factory=list)
    killed: bool = False

    def hear(self, message: Mapping[str, Any], at: float) -> None:
        what, rank = message.get("is"), int(message.get("rank", 0))
        if what == "killed":
            self.killed = True
        elif what == "failed":
            kind, why = str(message.get("kind")), str(message.get("why"))
            self._fail(rank, failure(str(message.get("stage")), kind, why), at)
        elif what == "died":
            self._fail(rank, death(self.stages.get(rank, "driver"), int(message.get("signal", 0))), at)
        elif what == "measured":
            self.gib_per_s.append(float(message["gib_per_s"]))
        elif isinstance(what, str):
            self._reach(rank, what, at)

    def _reach(self, rank: int, stage: str, at: float) -> None:
        self.words_at = at if self.words_at is None else self.words_at
        self.stages[rank] = stage
        if self.ready_at is None and self._all_in("ready", "passed"):
            self.ready_at = at
        if self.passed_at is None and self._all_in("passed"):
            self.passed_at = at

    def _all_in(self, *stages: str) -> bool:
        return sum(stage in stages for stage in self.stages.values()) == len(self.devices)

    def _fail(self, rank: int, failed: Failure, at: float) -> None:
        self.failures.setdefault(rank, failed)
        self.failed_at = at if self.failed_at is None else self.failed_at

    @property
    def passed(self) -> bool:
        return self.passed_at is not None

    @property
    def took_s(self) -> float:
        """From the moment all ranks were ready until all had passed; 0 where they have not."""
        return 0.0 if self.ready_at is None or self.passed_at is None else self.passed_at - self.ready_at

    def failed(self, at: float) -> bool:
        """Whether it has failed, and whoever had to say something about that has had the time to."""
        if self.passed or self.failed_at is None:
            return False
        said = set(self.failures) | {rank for rank, stage in self.stages.items() if stage == "passed"}
        if len(said) == len(self.devices):
            return True
        # Whether it is the GPU's fault or the driver's shows once another has come through, or has failed too.
        return at - self.failed_at >= self.settled_s and not (self._fail_alone() and not self._witnessed())

    def settled(self, at: float) -> bool:
        return self.passed or self.failed(at)

    def waits(self) -> bool:
        """Whether all its ranks are ready, and nothing has come of it yet."""
        return self.ready_at is not None and not self.passed and self.failed_at is None

    def alone(self) -> bool:
        """Whether each of its GPUs works all by itself."""
        return self._all_in("alone", "ready", "passed")

    def broken(self) -> bool:
        """Whether what has failed is what is between the GPUs, and nothing else that could have been the reason."""
        found = self.failures.values()
        return bool(found) and all(failed.proven and failed.stage in BETWEEN_GPUS for failed in found)

    def broken_gpus(self) -> dict[int, str]:
        """By device, what it fails at all by itself. None of several where none has come through: that is the driver's doing, or
        the host's."""
        if len(self.devices) > 1 and not self._witnessed():
            return {}
        return {self.devices[rank]: each.why for rank, each in self._fail_alone().items()}

    def _fail_alone(self) -> dict[int, Failure]:
        return {rank: each for rank, each in self.failures.items() if each.proven and each.stage in ON_ONE_GPU}

    def _witnessed(self) -> bool:
        """Whether one of the GPUs has come through all by itself."""
        return any(stage in ("alone", *BETWEEN_GPUS) for stage in self.stages.values())

    def why(self) -> str:
        """What kept it from passing, in the words of the ranks; the proven ones last, as the others may explain them."""
        first = self._first()
        return f"rank {first[0]}: {first[1].why}" if first else ""

    def _first(self) -> tuple[int, Failure] | None:
        return min(self.failures.items(), key=lambda item: (item[1].proven, item[0]), default=None)

    def error(self) -> str:
        """What NCCL itself says of its failing, but for addresses and counts; "" where it does not say anything."""
        first = self._first()
        return _NUMBERS.sub("", first[1].why) if first and first[1].raised else ""


def failure(stage: str, kind: str, why: str) -> Failure:
    """What a rank has said of its failing. `kind` is the exception's class, or "wrong" for a result that is not right."""
    if kind == "wrong":
        return Failure(stage, why, True)
    if _NOBODYS.search(why):
        return Failure(stage, _short(why), False)
    if stage in BETWEEN_GPUS:
        return Failure(stage, _short(why), bool(kind == "DistBackendError" or _OF_NCCL.search(why)), raised=True)
    return Failure(stage, _short(why), bool(stage in ON_ONE_GPU and _OF_A_GPU.search(why)))


def death(stage: str, number: int) -> Failure:
    """What a rank's end by signal `number` means; 0: it ended by itself."""
    try:
        how = f"ended by {signal.Signals(number).name}"
    except ValueError:
        how = f"ended by signal {number}" if number else "ended by itself"
    return Failure(stage, how, number in _CRASHES and stage in BETWEEN_GPUS)


def _short(why: str) -> str:
    """Of NCCL's errors its code and what it says last, of CUDA's the first sentence."""
    said = _LAST_WORD.search(why)
    text = f"{said['code']}: {said['why']}" if said else why.split(" CUDA kernel errors might be", 1)[0]
    return text[:300]
