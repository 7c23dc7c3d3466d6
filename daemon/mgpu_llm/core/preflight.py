"""What a preflight asks of the GPUs before an engine reaches them, and what it has found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

#: The transport that the launch itself would use: whatever NCCL chooses under its environment.
AS_LAUNCHED: Final = "as-launched"
#: How variables begin by which NCCL finds its way between GPUs.
OF_NCCL: Final = ("NCCL_", "CUDA_", "TORCH_NCCL_", "VLLM_NCCL_")


class When(StrEnum):
    """Whether the GPUs are checked, and whether an engine waits for that or loads meanwhile, as far as it comes without them."""

    OFF = "off"
    BEFORE = "before"
    OVERLAP = "overlap"


@dataclass(frozen=True, kw_only=True)
class Transport:
    """One way for GPUs to talk to each other, and how it did. `works` is None where that was not found out.

    `gib_per_s` is the all-reduce's algorithm bandwidth (bytes of one rank's tensor by time), measured while other things may
    go on on the host; `took_s` from the ranks' first word to the result. `detail` says what went wrong, "" where nothing did.
    """

    name: str
    works: bool | None = None
    gib_per_s: float | None = None
    took_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a preflight has found. GPUs are entries of CUDA_VISIBLE_DEVICES.

    `transports` are in the order in which they were asked about, the launch's own first; none where there is one GPU. `gpus`
    are those that fail all by themselves and `pairs` those that do not reach each other as launched, each with a sentence that
    says how. `took_s` is all of it; `remembered`: it had passed before, and nothing was run. `unobserved` says why nothing is
    known, "" where something is.
    """

    transports: tuple[Transport, ...] = ()
    gpus: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], str] = field(default_factory=dict)
    took_s: float = 0.0
    remembered: bool = False
    unobserved: str = ""
