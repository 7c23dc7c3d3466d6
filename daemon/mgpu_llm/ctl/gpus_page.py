"""The page of `mgpuctl gpus`: a line for each GPU, below it who uses it and what is wrong, then what joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mgpu_llm.ctl.topology import topology_lines
from mgpu_llm.ctl.words import Page, cells, filled, plain, size

#: What is below a GPU stands under its name.
INDENT: Final = 5
#: What a name may be cut to, at least.
LEAST_NAME: Final = 8
HEADS: Final = ("GPU", "NAME", "MEMORY", "BUSY", "POWER", "TEMP")
#: In `HEALTH` and, below it, in whole: what the driver asks for (NVML's recovery actions).
ACTIONS: Final = {
    "reset": (
        "needs reset",
        "the driver asks for a reset of this GPU: end who uses it, then nvidia-smi --gpu-reset -i {index}",
    ),
    "reboot": ("needs reboot", "the driver asks for a reboot of this host"),
    "drain-p2p": ("drain P2P", "the driver asks to end all traffic between GPUs, then to ask it again"),
    "drain-and-reset": (
        "drain, reset",
        "it works with less: let who uses it end in peace, then nvidia-smi --gpu-reset -i {index}",
    ),
    "recover-imex-domain": ("recover IMEX", "the driver asks to recover the IMEX domain"),
    "bus-reset": ("bus reset", "the driver asks for a reset of its bus"),
    "system-reboot": ("needs reboot", "the driver asks for a reboot of the whole system"),
}


def gpu_page(document: Mapping[str, Any], page: Page) -> list[str]:
    """`document` is gpu_json's. Raises KeyError or TypeError where it is not."""
    gpus = document["gpus"]
    lines = _table(gpus, page) if gpus else ["this host has no GPU that the driver knows"]
    lines += [page.paint(line, "red") for line in _missing(document, page)]
    if marks := _legend(gpus):
        lines += ["", *page.wrap(marks, 0)]
    if joined := topology_lines(document, page):
        lines += ["", *joined]
    driver, cuda = (plain(document[key] or "not told") for key in ("driver", "cuda"))
    return [*lines, "", f"driver {driver}, CUDA {cuda}"]


def _table(gpus: Sequence[Mapping[str, Any]], page: Page) -> list[str]:
    told = [HEADS, *(_cells(gpu, page) for gpu in gpus)]
    ends = ["HEALTH", *(_health(gpu)[0] for gpu in gpus)]
    rows = _fitted(told, max(map(len, ends)), page)
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    marks = [" ", *(_mark(gpu) for gpu in gpus)]
    lines = [
        f"{mark} {'  '.join(filled(cell, width) for cell, width in zip(row, widths, strict=True))}"
        for mark, row in zip(marks, rows, strict=True)
    ]
    shown = [f"{lines[0]}  HEALTH"]
    for gpu, line in zip(gpus, lines[1:], strict=True):
        words, colour = _health(gpu)
        shown += [f"{line}  {page.paint(words, colour, bold=colour == 'red')}", *_below(gpu, page)]
    return shown


def _fitted(rows: Sequence[Sequence[str]], end: int, page: Page) -> list[Sequence[str]]:
    """The rows with names that leave room for everything else."""
    if page.width is None:
        return list(rows)
    others = [max(cells(row[at]) for row in rows) for at in range(len(HEADS)) if at != 1]
    room = page.width - 2 - sum(others) - 2 * len(HEADS) - end
    return [(row[0], page.cut(row[1], max(room, LEAST_NAME)), *row[2:]) for row in rows]


def _cells(gpu: Mapping[str, Any], page: Page) -> tuple[str, ...]:
    used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
    power, limit = gpu["power_mw"], gpu["power_limit_mw"]
    degrees = "°C" if page.unicode else "C"
    watts = None if power is None else f"{power / 1000:>3.0f}" + ("" if limit is None else f"/{limit / 1000:.0f}")
    return (
        str(int(gpu["index"])),
        plain((gpu["name"] or "-").removeprefix("NVIDIA ")),
        "-" if None in (used, total) else f"{used / 2**30:>5.1f}/{total / 2**30:.1f} GiB",
        _told(gpu["utilisation_percent"], "{:>3} %"),
        _told(watts, "{} W"),
        _told(gpu["temperature_c"], f"{{}} {degrees}"),
    )


def _told(value: int | str | None, words: str) -> str:
    return "-" if value is None else plain(words.format(value))


def _health(gpu: Mapping[str, Any]) -> tuple[str, str | None]:
    """In a word or two, and in which colour."""
    action, errors = gpu["recovery_action"], gpu["ecc_uncorrected"]
    if gpu["lost"]:
        return "LOST", "red"
    if gpu["untold"]:
        return "no access", "yellow"
    if action not in (None, "none"):
        return ACTIONS.get(action, (plain(str(action)), ""))[0], "red"
    if errors:
        return f"{int(errors)} ECC error{'s' if errors != 1 else ''}", "yellow"
    return "ok", None


def _below(gpu: Mapping[str, Any], page: Page) -> list[str]:
    """What is wrong with it, then who uses it."""
    action = gpu["recovery_action"]
    words = [gpu["lost"] and f"{gpu['lost']}; its PCI address is {gpu['pci'] or 'not told'}", gpu["untold"]]
    if action in ACTIONS:
        words.append(ACTIONS[action][1].format(index=gpu["index"]))
    if gpu["ecc_uncorrected"]:
        words.append("errors of its memory that could not be corrected, since the driver was loaded")
    if gpu["mig"]:
        parts = [_slice(part) for part in gpu["mig_slices"] or ()]
        words.append(f"MIG is on: {', '.join(parts) or 'it has no slices'}")
    if gpu["compute_mode"] not in (None, "default"):
        words.append(f"compute mode: {gpu['compute_mode']}")
    lines = [line for text in words if text for line in page.wrap(text, INDENT)]
    return [" " * INDENT + line for line in [*lines, *_users(gpu, page)]]


def _users(gpu: Mapping[str, Any], page: Page) -> list[str]:
    told = []
    for process in gpu["processes"] or ():
        who = (process["user"] or "not told whose") + (", this engine" if process["of_the_engine"] else "")
        held = _size(process["used_bytes"])
        kind = "" if process["kind"] == "compute" else f"{process['kind']}, "
        text = plain(f"{int(process['pid'])}  {who}  {kind}{held}  {process['command'] or ''}".rstrip())
        told.append(text if page.width is None else page.cut(text, page.width - INDENT))
    return told


def _slice(part: Mapping[str, Any]) -> str:
    """With its mark; a daemon of an earlier version has none."""
    mark = _mark({"in_use": False, "configured": False, **part}).strip()
    return f"{mark}{part['uuid']} ({_size(part['memory_total_bytes'])})"


def _size(count_bytes: int | None) -> str:
    return "size not told" if count_bytes is None else size(count_bytes)


def _mark(gpu: Mapping[str, Any]) -> str:
    return "*" if gpu["in_use"] else "+" if gpu["configured"] else " "


def _legend(gpus: Sequence[Mapping[str, Any]]) -> str:
    marks = {_mark(gpu) for gpu in gpus}
    words = {"*": "* in use by this engine", "+": "+ named in its config, and not in use"}
    return "   ".join(text for mark, text in words.items() if mark in marks)


def _missing(document: Mapping[str, Any], page: Page) -> list[str]:
    return [
        line
        for uuid in document["missing"]
        for line in page.wrap(f"{uuid}, which the config names, is not among the GPUs that the driver lists", 0)
    ]
