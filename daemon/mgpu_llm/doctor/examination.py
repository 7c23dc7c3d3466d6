"""All checks, side by side, each with a deadline of its own: what one of them meets costs none of the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine.aside import answered, aside
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.host import engine_cuda, engine_versions
from mgpu_llm.config import engine_args as options
from mgpu_llm.config import launching, model
from mgpu_llm.config.endpoint import listening
from mgpu_llm.config.parse import Loaded
from mgpu_llm.control_api import DEFAULT_STATE_DIR
from mgpu_llm.core.launch import environment
from mgpu_llm.doctor import (
    cuda,
    devices,
    disks,
    driver,
    engine,
    fabric,
    gpus,
    limits,
    links,
    memory,
    ports,
    settings,
    weights,
)
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.engine import Installed
from mgpu_llm.doctor.finding import Finding, Subject
from mgpu_llm.doctor.gpus import Told
from mgpu_llm.doctor.system import System
from mgpu_llm.doctor.unit import Unit, installed

#: The engine's Python may take so long for its first answer, on a disk that is asleep.
ENGINE_S: Final = 12.0
UNIT_S: Final = 4.0
CHECK_S: Final = 6.0
#: The config's own checks start the engine's Python, which has 20 s.
CONFIG_S: Final = 22.0
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


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What several checks need. `environ` is what the engine inherits, `engine_environ` what it has in the end; `limits` are
    those under which it will run, of its unit where there is one. `told` is None where the config wants no GPUs."""

    unit: Unit | None
    limits: Unit
    environ: Mapping[str, str]
    engine_environ: Mapping[str, str]
    told: Told | None
    installed: Installed
    ranks: int
    weights: int | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """`subject` is what is told of it where it does not come to an end."""

    subject: Subject
    name: str
    work: Callable[[], Iterable[Finding]]
    limit_s: float = CHECK_S


async def examine(patient: Patient, nvml: Gpus) -> list[Finding]:
    """What was found, in the order of the subjects. Takes some seconds, half a minute at most. Raises nothing."""
    facts = await _facts(patient, nvml)
    found = await asyncio.gather(*(run(check) for check in _checks(patient, facts)))
    return [finding for findings in found for finding in findings]


async def run(check: Check) -> list[Finding]:
    """What one check finds, or why that is not known. Raises nothing."""
    try:
        return await answered(lambda: list(check.work()), check.limit_s)
    except TimeoutError:
        return [check.subject.unknown(check.name, f"no answer within {check.limit_s:g} s")]
    except Exception as fault:  # noqa: BLE001 - a fault in one check must not cost the others
        return [check.subject.unknown(check.name, f"a fault of the doctor: {type(fault).__name__}: {fault}")]


async def _facts(patient: Patient, nvml: Gpus) -> Facts:
    unit = await aside(installed, UNIT_S)
    served = unit if unit is not None and unit.user == patient.who.name else None
    environ = _environ(patient, served)
    loaded = patient.loaded
    whole = environ if loaded is None else environment(environ, launching.to_base_launch(loaded.config, None))
    use = "all" if loaded is None else loaded.config.gpus.use
    told, found, size = await asyncio.gather(
        _told(nvml, use),
        aside(lambda: _installed(loaded, environ, whole), ENGINE_S),
        aside(lambda: None if loaded is None else model.weights_bytes(loaded.config, environ), CHECK_S),
    )
    return Facts(
        unit=served,
        limits=served or limits.of_this_process(patient.system),
        environ=environ,
        engine_environ=whole,
        told=told,
        installed=found or Installed(),
        ranks=_ranks(loaded, told),
        weights=size,
    )


def _checks(patient: Patient, facts: Facts) -> list[Check]:
    return [*_of_the_gpus(patient, facts), *_of_the_host(patient, facts), *_of_the_config(patient, facts)]


def _of_the_gpus(patient: Patient, facts: Facts) -> list[Check]:
    system, told = patient.system, facts.told
    version = told.driver if told else ""
    first = Check(
        subject=driver.SUBJECT,
        name="driver-module",
        work=lambda: driver.check(
            system, wanted=patient.wants_gpus, told=version, silence=told.silence if told else ""
        ),
    )
    if told is None:
        return [first]
    count = len(told.host.gpus) if told.host else None
    checks = [
        first,
        Check(subject=devices.SUBJECT, name="devices-access", work=lambda: devices.check(system, patient.who, count)),
        Check(subject=gpus.SUBJECT, name="gpus-present", work=lambda: gpus.check(system, told)),
        Check(subject=fabric.SUBJECT, name="fabric-manager", work=lambda: fabric.check(system, version)),
    ]
    checks.append(Check(subject=links.SUBJECT, name="links-p2p", work=lambda: links.check(system, told.pairs)))
    if patient.loaded is not None and told.host is not None:
        checks.insert(1, Check(subject=cuda.SUBJECT, name=cuda.NAME, work=lambda: [_cuda(facts, told)]))
    return checks


def _of_the_host(patient: Patient, facts: Facts) -> list[Check]:
    system, who, ranks = patient.system, patient.who, facts.ranks
    state = DEFAULT_STATE_DIR if patient.loaded is None else patient.loaded.config.daemon.state_dir
    limit = facts.unit.memory_bytes if facts.unit is not None else memory.group_limit(system)
    return [
        Check(
            subject=memory.SUBJECT,
            name="memory-free",
            work=lambda: memory.check(system, ranks=ranks, weights=facts.weights, limit=limit),
        ),
        Check(subject=memory.SUBJECT, name="memory-shm", work=lambda: memory.shared(system, ranks)),
        Check(subject=limits.SUBJECT, name="limits-files", work=lambda: limits.check(system, facts.limits, who, ranks)),
        Check(
            subject=disks.SUBJECT,
            name="disks-space",
            work=lambda: disks.check(system, facts.engine_environ, state, who),
        ),
    ]


def _of_the_config(patient: Patient, facts: Facts) -> list[Check]:
    loaded, system = patient.loaded, patient.system
    variables = Check(
        subject=engine.SUBJECT,
        name="engine-environment",
        work=lambda: engine.variables(system, facts.engine_environ),
    )
    if loaded is None:
        return [variables]
    runtime = Path(loaded.config.daemon.runtime_dir)
    return [
        *_of_the_model(loaded, patient, facts),
        Check(
            subject=engine.SUBJECT,
            name="engine-versions",
            work=lambda: engine.versions(facts.installed, wanted=patient.wants_gpus),
        ),
        variables,
        Check(
            subject=ports.SUBJECT,
            name="ports-engine",
            work=lambda: ports.check(system, listening(loaded.config), runtime, patient.who),
        ),
        Check(
            subject=settings.SUBJECT,
            name="config",
            work=lambda: settings.check(loaded, facts.environ, facts.told.sizes if facts.told else None),
            limit_s=CONFIG_S,
        ),
    ]


def _of_the_model(loaded: Loaded, patient: Patient, facts: Facts) -> list[Check]:
    folder = model.model_folder(loaded.config, facts.environ)
    dummy = options.value(loaded.config.engine.args, options.LOAD_FORMAT) == "dummy"
    # What is no folder at all is a problem of the config, and a model of the hub's is fetched at the first start.
    if folder is None or not folder.is_dir() or dummy:
        return []
    tokenizer = not {"--tokenizer", "--skip-tokenizer-init"} & set(loaded.config.engine.args)
    return [
        Check(
            subject=weights.SUBJECT,
            name="model-weights",
            work=lambda: weights.check(folder, sorted(model.weight_files(folder)), patient.who, tokenizer=tokenizer),
        ),
        Check(
            subject=weights.SUBJECT,
            name="model-speed",
            work=lambda: weights.reading(patient.system, sorted(model.weight_files(folder))),
        ),
    ]


async def _told(nvml: Gpus, use: object) -> Told | None:
    if use == "none":
        return None
    return await gpus.ask(nvml, use if isinstance(use, tuple) else "all")


def _environ(patient: Patient, served: Unit | None) -> Mapping[str, str]:
    """What the engine will inherit: of the service's unit where it is that which will run, else ours."""
    who = patient.who
    own = {"HOME": who.home, "USER": who.name, "LOGNAME": who.name}
    if served is not None:
        return {"PATH": PATH, **own, **served.environment}
    return patient.environ if who.uid == os.geteuid() else {**patient.environ, **own}


def _installed(loaded: Loaded | None, environ: Mapping[str, str], whole: Mapping[str, str]) -> Installed:
    if loaded is None:
        return Installed()
    try:
        command = launching.engine_command(loaded.config.engine, environ)
    except OSError:
        return Installed()
    found, built = engine_versions.versions(command, whole), engine_cuda.built(command, whole)
    return Installed(
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
    times = 1
    for number in options.multipliers(loaded.config.engine.args).values():
        times *= number
    return (launching.tensor_parallel(loaded.config, count) or 1) * times


def _cuda(facts: Facts, told: Told) -> Finding:
    found = facts.installed
    asked = facts.engine_environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").strip().lower() in ("1", "true")
    return cuda.check(told.driver, told.cuda, found.cuda, found.torch, compatibility=asked)
