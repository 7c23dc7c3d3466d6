"""As many GPUs as CUDA_VISIBLE_DEVICES has entries, or as FAKE_TORCH_GPUS says."""

from __future__ import annotations

import os
import time

from torch import faults

_current = 0


def init() -> None:
    faults.come("init")


def device_count() -> int:
    told = os.environ.get("FAKE_TORCH_GPUS")
    return int(told) if told else len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))


def set_device(device: int) -> None:
    global _current
    _current = device
    faults.come("context", gpu=device)


def current_device() -> int:
    return _current


def synchronize(device: int | None = None) -> None:
    """Nothing is ever under way here."""


def can_device_access_peer(device: int, peer: int) -> bool:
    return device != peer


def _sleep(cycles: int) -> None:
    """What is asked of the GPU from here on waits so long; here it is whoever asks."""
    time.sleep(cycles / 1e9)
