"""What several checks need to know of host, engine and config, found out once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.host import engine_cuda, engine_versions
from mgpu_llm.adapters.host.program import RunAs
from mgpu_llm.config import engine_args as options
from mgpu_llm.config import files, launching, model
from mgpu_llm.config.parse import Loaded
from mgpu_llm.core import instances
from mgpu_llm.core.launch import environment
from mgpu_llm.core.slices import is_slice
from mgpu_llm.doctor import account, gpus, limits
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.engine import Installed
from mgpu_llm.doctor.gpus import Told
from mgpu_llm.doctor.system import System
from mgpu_llm.doctor.unit import Unit, installed

#: The engine's Python may take so long for its first answer, on a disk that is asleep.
ENGINE_S: Final = 12.0
UNIT_S: Final = 4.0
DISK_S: Final = 6.0
#: What a service finds its programs in (systemd.exec, "PATH"; 252).
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is examined. `loaded` is None where there is no config, and the host alone is looked at; `environ` is our own."""

    loaded: Loaded | None
    who: Account
    environ: Mapping[str, str]
    system: System = field(default_factory=System)

    @property
    def wants_gpus(self) -> bool:
        return self.loaded is None or self.loaded.config.gpus.use != "none"

    @property
    def wants_slice(self) -> bool:
        """Whether a MIG slice is among what the config names."""
        if self.loaded is None:
            return False
        chosen = self.loaded.config.gpus
        return any(map(is_slice, (*(chosen.use if isinstance(chosen.use, tuple) else ()), *chosen.spares)))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """`environ` is what the engine inherits, `engine_environ` what it has in the end; `limits` are those under which it will run,
    of its unit where there is one. `told` is None where the config wants no GPUs, and `folder` where no model lies on this host
    that the engine would read."""

    unit: Unit | None
    limits: Unit
    environ: Mapping[str, str]
    engine_environ: Mapping[str, str]
    told: Told | None
    installed: Installed
    ranks: int
    folder: Path | None
    weights: int | None


async def gather(patient: Patient, nvml: Gpus) -> Facts:
    """Takes some seconds at most. Raises nothing."""
    name = instances.unit("" if patient.loaded is None else files.instance(patient.loaded.main))
    unit = await aside(lambda: installed(name), UNIT_S)
    served = unit if unit is not None and unit.user == patient.who.name else None
    environ = _environ(patient, served)
    loaded = patient.loaded
    whole = environ if loaded is None else environment(environ, launching.to_base_launch(loaded.config, None))
    use = "all" if loaded is None else loaded.config.gpus.use
    told, found, folder = await asyncio.gather(
        _told(nvml, use, () if loaded is None else loaded.config.gpus.spares),
        aside(lambda: _installed(loaded, environ, whole, account.other(patient.who)), ENGINE_S),
        aside(lambda: _model_folder(loaded, environ), DISK_S),
    )
    size = await aside(lambda: model.weights_bytes(loaded.config, environ), DISK_S) if loaded and folder else None
    return Facts(
        unit=served,
        limits=served or limits.of_this_process(patient.system, name),
        environ=environ,
        engine_environ=whole,
        told=told,
        installed=found or Installed(),
        ranks=_ranks(loaded, told),
        folder=folder,
        weights=size,
    )


async def _told(nvml: Gpus, use: object, spares: Sequence[int | str]) -> Told | None:
    if use == "none":
        return None
    return await gpus.ask(nvml, use if isinstance(use, tuple) else "all", spares)


def _environ(patient: Patient, served: Unit | None) -> Mapping[str, str]:
    """What the engine will inherit: of the service's unit where it is that which will run, else ours."""
    who = patient.who
    own = {"HOME": who.home, "USER": who.name, "LOGNAME": who.name}
    if served is not None:
        return {"PATH": PATH, **own, **served.environment}
    return patient.environ if who.uid == os.geteuid() else {**patient.environ, **own}


def _model_folder(loaded: Loaded | None, environ: Mapping[str, str]) -> Path | None:
    """What is no folder at all is a problem of the config, and a model of the hub's is fetched at the first start."""
    if loaded is None or options.value(loaded.config.engine.args, options.LOAD_FORMAT) == "dummy":
        return None
    folder = model.model_folder(loaded.config, environ)
    return folder if folder is not None and folder.is_dir() else None


def _installed(
    loaded: Loaded | None, environ: Mapping[str, str], whole: Mapping[str, str], run_as: RunAs | None
) -> Installed:
    """What can be written by whom the engine runs as is not run as root."""
    if loaded is None:
        return Installed()
    try:
        command = launching.engine_command(loaded.config.engine, environ)
    except OSError:
        return Installed()
    found, built = engine_versions.versions(command, whole, run_as), engine_cuda.built(command, whole, run_as)
    return Installed(
        program=command[0],
        vllm=found.get("vllm", ""),
        torch=found.get("torch", ""),
        nccl=found.get("nccl", ""),
        cuda=built.cuda if built else "",
        without_cuda=built is not None and not built.cuda,
    )


def _ranks(loaded: Loaded | None, told: Told | None) -> int:
    """Processes that load; without a config as many as there are GPUs."""
    count = len(told.chosen) if told else 0
    if loaded is None:
        return max(count, 1)
    if not count and isinstance(loaded.config.gpus.use, tuple):
        count = len(loaded.config.gpus.use)
    times = prod(options.multipliers(loaded.config.engine.args).values())
    return (launching.tensor_parallel(loaded.config, count) or 1) * times
