"""All-reduces among processes that meet in the files beside the FileStore's. Each waits until all have come, as NCCL does."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from pathlib import Path

from torch import cuda, faults
from torch.tensor import Tensor

POLL_S = 0.005
_calls = itertools.count()
_group: tuple[Path, int, int] | None = None


class FileStore:
    def __init__(self, path: str, world_size: int) -> None:
        self.path, self.world_size = Path(path), world_size
        self.path.touch()


def is_available() -> bool:
    return True


def is_nccl_available() -> bool:
    return True


def init_process_group(backend: str, *, store: FileStore, rank: int, world_size: int, timeout: timedelta) -> None:
    global _group
    faults.come("meet", gpu=cuda.current_device())
    _group = (store.path, rank, world_size)


def get_rank() -> int:
    return _joined()[1]


def get_world_size() -> int:
    return _joined()[2]


def all_reduce(tensor: Tensor) -> None:
    """The sum over all ranks, in place; for tensors that `full` has made."""
    path, rank, world = _joined()
    wrong = faults.come("all_reduce", gpu=cuda.current_device(), ranks=world)
    call = next(_calls)
    mine = path.with_name(f"{path.name}.{call}.{rank}")
    fresh = mine.with_name(f"{mine.name}.new")
    fresh.write_text(str(tensor.min()))
    fresh.replace(mine)
    others = [path.with_name(f"{path.name}.{call}.{other}") for other in range(world)]
    while not all(other.exists() for other in others):
        time.sleep(POLL_S)
    tensor.values = sum(float(other.read_text()) for other in others) + wrong


def _joined() -> tuple[Path, int, int]:
    if _group is None:
        raise RuntimeError("Default process group has not been initialized")
    return _group
