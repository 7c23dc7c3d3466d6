"""What this host says of itself where the config depends on it: its GPUs, and the versions of what the engine runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.gpus import Gpu, Gpus, GpusUnobserved, resolve
from mgpu_llm.adapters.host import engine_versions
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem
from mgpu_llm.config.schema import Config
from mgpu_llm.core.ladder import Nvlink

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: The engine's Python has 5 s to tell its versions; one that is stuck on a disk cannot even be killed.
ENGINE_S: Final = 7.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """The configured GPUs. `uuids` and `spares` have NVML's UUIDs by entry of CUDA_VISIBLE_DEVICES, in the config's order;
    `uuids` is None where the config wants no GPUs. `parts` has the UUIDs of the MIG slices of each divided GPU of this host, by
    its own. `memory_bytes` is what each of those in use has, in the config's order, and `held_bytes` what is used of it now and
    what there is, by entry; a GPU that does not tell is not in it. `out` are those of `uuids` and `spares` that are lost, by
    entry, each with why, and `lost` those that the config does not mean; their UUIDs may be ""."""

    uuids: Mapping[str, str] | None = None
    spares: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory_bytes: tuple[int, ...] = ()
    held_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    nvlink: Nvlink = Nvlink.NONE
    out: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Of the driver, and of what is in the engine's environment; `boot` is the id of this boot, and `python` how the engine's
    Python is called. "" and () are what nobody tells."""

    driver: str = ""
    vllm: str = ""
    torch: str = ""
    nccl: str = ""
    boot: str = ""
    python: tuple[str, ...] = ()


async def find_gpus(loaded: Loaded, driver: Gpus) -> Found | ConfigProblem | GpusUnobserved:
    """The configured GPUs, or why there are none.

    vLLM gets indices wherever it can, because releases before 0.24 fail on UUIDs in CUDA_VISIBLE_DEVICES
    (platforms/interface.py makes a number of each entry).
    """
    wanted = loaded.config.gpus
    if wanted.use == "none" or loaded.faulty("gpus"):
        return Found()
    place = "use"
    try:
        inventory = await driver.inventory()
        _some_left(inventory)
        chosen = resolve(wanted.use, inventory)
        place = "spares"
        together = chosen if wanted.use == "all" else resolve((*wanted.use, *wanted.spares), inventory)
        # Which lost GPU a name is taken for may depend on the others that are named.
        chosen = together[: len(chosen)]
    except GpusUnobserved as silence:
        return silence
    except ValueError as error:
        return loaded.problem(("gpus", place), str(error))
    meant = {gpu.index for gpu in together}
    sound = [gpu for gpu in chosen if not gpu.lost]
    return Found(
        uuids=_by_entry(chosen),
        spares=_by_entry(together[len(chosen) :]),
        parts={gpu.uuid: tuple(part.uuid for part in gpu.slices if part.uuid) for gpu in inventory if gpu.slices},
        memory_bytes=_memory(chosen, together),
        held_bytes=await _held(driver, sound),
        nvlink=await _nvlink(driver, [gpu.uuid for gpu in sound]),
        out={gpu.entry: gpu.lost for gpu in together if gpu.lost},
        lost={gpu.entry: gpu.lost for gpu in inventory if gpu.lost and gpu.index not in meant},
    )


def as_written(config: Config) -> Found | None:
    """The GPUs as the config names them, where nobody can be asked; None where it names none but wants all."""
    use = config.gpus.use
    if use == "all":
        return None
    if use == "none":
        return Found()
    return Found(
        uuids={str(gpu): str(gpu) for gpu in use},
        spares={str(gpu): str(gpu) for gpu in config.gpus.spares},
    )


async def find_versions(driver: Gpus | None, command: Sequence[str], environment: Mapping[str, str]) -> Versions:
    """What `command` will run on in the engine's whole `environment`; an engine without GPUs needs no driver. Takes seconds at
    most, and the loop goes on. Raises nothing."""
    told, engine = await asyncio.gather(_driver(driver), aside(lambda: _engine(command, environment), ENGINE_S))
    return replace(engine or Versions(), driver=told, boot=_boot())


def _engine(command: Sequence[str], environment: Mapping[str, str]) -> Versions:
    told = engine_versions.versions(command, environment)
    try:
        python = tuple(engine_versions.python_of(command, environment))
    except (OSError, ValueError):
        python = ()
    named = {what: told.get(what, "") for what in ("vllm", "torch", "nccl")}
    return Versions(**named, python=python)


async def one_process_only(driver: Gpus, uuids: Collection[str]) -> bool:
    """Whether one of these GPUs takes one process at a time (nvidia-smi -c EXCLUSIVE_PROCESS): a check beside an engine would
    keep that out."""
    try:
        told = await driver.details()
    except GpusUnobserved:
        return False
    return any(gpu.uuid in uuids and (gpu.compute_mode or "").startswith("exclusive") for gpu in told.gpus)


def _some_left(inventory: Sequence[Gpu]) -> None:
    """Raises GpusUnobserved where every GPU of this host is lost."""
    if inventory and all(gpu.lost for gpu in inventory):
        told = "; ".join(f"GPU {gpu.index}: {gpu.lost}" for gpu in inventory)
        raise GpusUnobserved(f"no GPU of this host can be used: {told}; reset them, or reboot the host")


def _memory(chosen: Sequence[Gpu], together: Sequence[Gpu]) -> tuple[int, ...]:
    """What each of the chosen GPUs has. A lost one counts with the least of those that are left, one of which has to stand in for
    it: so what cannot fit is still known."""
    least = min((gpu.memory_total_bytes for gpu in together if not gpu.lost), default=0)
    return tuple(least if gpu.lost else gpu.memory_total_bytes for gpu in chosen)


def _by_entry(gpus: Sequence[Gpu]) -> dict[str, str]:
    return {gpu.entry: gpu.uuid for gpu in gpus}


async def _nvlink(driver: Gpus, uuids: Sequence[str]) -> Nvlink:
    try:
        joined = await driver.nvlinked(uuids)
    except GpusUnobserved:
        return Nvlink.NONE
    if not joined:
        return Nvlink.NONE
    return Nvlink.ALL if len(joined) == len(list(combinations(uuids, 2))) else Nvlink.SOME


async def _held(driver: Gpus, gpus: Sequence[Gpu]) -> dict[str, tuple[int, int]]:
    try:
        told = await driver.read([gpu.uuid for gpu in gpus])
    except GpusUnobserved:
        return {}
    return {
        gpu.entry: (reading.memory_used_bytes, reading.memory_total_bytes)
        for gpu, reading in zip(gpus, told, strict=True)
    }


async def _driver(driver: Gpus | None) -> str:
    if driver is None:
        return ""
    try:
        return (await driver.versions()).get("driver", "")
    except GpusUnobserved:
        return ""


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
