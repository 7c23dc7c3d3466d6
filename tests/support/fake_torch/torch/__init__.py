"""A small stand-in for PyTorch on a machine without GPUs: what a preflight asks of it, with real processes that really talk to
each other. `faults` says how to break it."""

from __future__ import annotations

from torch import cuda, distributed, faults
from torch.tensor import Tensor, arange, full, zeros

__version__ = "0.0+stand-in"
__all__ = ("Tensor", "arange", "cuda", "distributed", "full", "set_num_threads", "zeros")

faults.come("import")


def set_num_threads(count: int) -> None: ...
