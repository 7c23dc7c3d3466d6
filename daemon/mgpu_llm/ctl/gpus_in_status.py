"""The GPUs of the launch in words: what is used of what they have, and how busy they are."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu_llm.core.status import GpuStatus, Status
from mgpu_llm.ctl.words import Page, columns, filled, plain, size

#: More GPUs than these stand two in a line, under short names: eight would take a third of a terminal's 24 lines.
ONE_A_LINE = 4
#: "1a2b3c4d 120.5/141 GiB 100 % busy", twice.
TWO_WIDTH = 69


def gpu_lines(status: Status, page: Page, indent: int) -> list[str]:
    """A line for each GPU or, of many on a terminal, for each two; then why they are not observed, if so."""
    gpus = status.gpus
    if len(gpus) > ONE_A_LINE and page.width is not None and page.width - indent >= TWO_WIDTH:
        return _two_a_line(gpus) + unobserved(status)
    named = all(gpu.entry for gpu in gpus)
    names = [(f"GPU {gpu.entry}", gpu.uuid) if named else (gpu.uuid,) for gpu in gpus]
    rows = [(name, memory(gpu), busy(gpu), *uuid) for (name, *uuid), gpu in zip(names, gpus, strict=True)]
    return columns(rows) + unobserved(status)


def unobserved(status: Status) -> list[str]:
    if not status.gpus_unobserved:
        return []
    return [f"not observed{' now' if status.gpus else ''}: {plain(status.gpus_unobserved)}"]


def short_names(gpus: Sequence[GpuStatus], *, prefix: bool) -> list[str]:
    """As the config calls them, "GPU 2"; where that is not known, their UUIDs up to the second dash, "GPU-1a2b3c4d" or
    "1a2b3c4d", as long as that tells them apart."""
    if all(gpu.entry for gpu in gpus):
        return [plain(f"GPU {gpu.entry}") for gpu in gpus]
    names = ["-".join(gpu.uuid.split("-")[:2] if prefix else gpu.uuid.split("-")[1:2]) for gpu in gpus]
    return [plain(name) for name in (names if len({*names, ""}) > len(names) else [gpu.uuid for gpu in gpus])]


def memory(gpu: GpuStatus) -> str:
    """ "12.3 of 80 GiB": nobody needs the decimals of what does not move."""
    if gpu.total_bytes is None:
        return f"{size(gpu.used_bytes)} used"
    return f"{gpu.used_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.0f} GiB"


def busy(gpu: GpuStatus) -> str:
    return "" if gpu.utilisation_percent is None else f"{gpu.utilisation_percent} % busy"


def _two_a_line(gpus: Sequence[GpuStatus]) -> list[str]:
    names = short_names(gpus, prefix=False)
    cells = [
        f"{name} {memory(gpu).replace(' of ', '/'):>13} {busy(gpu):>10}" for name, gpu in zip(names, gpus, strict=True)
    ]
    width = max(map(len, cells))
    half = -(-len(cells) // 2)
    return [
        f"{filled(left, width)}   {right}".rstrip()
        for left, right in zip(cells[:half], [*cells[half:], ""][:half], strict=True)
    ]
