"""All checks, side by side, each with a deadline of its own: what one of them meets costs none of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine.aside import answered
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.config import model
from mgpu_llm.config.endpoint import listening
from mgpu_llm.config.parse import Loaded
from mgpu_llm.control_api import DEFAULT_STATE_DIR
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
    sandbox,
    settings,
    weights,
)
from mgpu_llm.doctor.facts import Facts, Patient, gather
from mgpu_llm.doctor.finding import Finding, Subject
from mgpu_llm.doctor.gpus import Told

CHECK_S: Final = 6.0
#: The config's own checks start the engine's Python, which has 20 s.
CONFIG_S: Final = 22.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """`subject` is what is told of it where it does not come to an end."""

    subject: Subject
    name: str
    work: Callable[[], Iterable[Finding]]
    limit_s: float = CHECK_S


async def examine(patient: Patient, nvml: Gpus) -> list[Finding]:
    """What was found, in the order of the subjects. Takes some seconds, half a minute at most. Raises nothing."""
    facts = await gather(patient, nvml)
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
        Check(
            subject=devices.SUBJECT,
            name="devices-access",
            work=lambda: devices.check(system, patient.who, count, sliced=patient.wants_slice),
        ),
        Check(subject=gpus.SUBJECT, name="gpus-present", work=lambda: gpus.check(system, told)),
        Check(subject=gpus.SUBJECT, name="gpus-reserved", work=lambda: _reserved(patient, told)),
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
    made = facts.unit.sandbox.made if facts.unit is not None else ()
    return [
        Check(
            subject=memory.SUBJECT,
            name="memory-free",
            work=lambda: memory.check(system, ranks=ranks, weights=facts.weights, limit=limit, unit=facts.limits.name),
        ),
        Check(subject=memory.SUBJECT, name="memory-shm", work=lambda: memory.shared(system, ranks)),
        Check(subject=limits.SUBJECT, name="limits-files", work=lambda: limits.check(system, facts.limits, who, ranks)),
        Check(
            subject=disks.SUBJECT,
            name="disks-space",
            work=lambda: disks.check(system, facts.engine_environ, state, who, made),
        ),
        *_of_the_unit(patient, facts, state),
    ]


def _of_the_unit(patient: Patient, facts: Facts, state_dir: str) -> list[Check]:
    unit, loaded = facts.unit, patient.loaded
    if unit is None:
        return []
    written = sandbox.writes(loaded, facts.engine_environ, state_dir)
    read = {} if loaded is None else sandbox.reads(loaded, facts.installed.program)
    return [
        Check(
            subject=sandbox.SUBJECT,
            name="unit-write",
            work=lambda: sandbox.check(unit.sandbox, unit.name, written, read, patient.who),
        )
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
            work=lambda: engine.versions(facts.installed, wanted=patient.wants_gpus, sliced=patient.wants_slice),
        ),
        Check(subject=engine.SUBJECT, name="engine-access", work=lambda: engine.access(facts.installed, patient.who)),
        variables,
        Check(
            subject=ports.SUBJECT,
            name="ports-engine",
            work=lambda: ports.check(system, listening(loaded.config), runtime, patient.who),
        ),
        Check(
            subject=settings.SUBJECT,
            name="config",
            work=lambda: settings.check(loaded, facts.environ, facts.told.sizes if facts.told else None, patient.who),
            limit_s=CONFIG_S,
        ),
    ]


def _of_the_model(loaded: Loaded, patient: Patient, facts: Facts) -> list[Check]:
    folder = facts.folder
    if folder is None:
        return []
    hub_id = "" if model.local_path(loaded.config.model.path) is not None else loaded.config.model.path
    tokenizer = not {"--tokenizer", "--skip-tokenizer-init"} & set(loaded.config.engine.args)
    return [
        Check(
            subject=weights.SUBJECT,
            name="model-weights",
            work=lambda: weights.check(
                folder, sorted(model.weight_files(folder)), patient.who, tokenizer=tokenizer, hub_id=hub_id
            ),
        ),
        Check(
            subject=weights.SUBJECT,
            name="model-speed",
            work=lambda: weights.reading(patient.system, sorted(model.weight_files(folder))),
        ),
    ]


def _reserved(patient: Patient, told: Told) -> Iterable[Finding]:
    if patient.loaded is None:
        return ()
    config = patient.loaded.config
    folders = [Path(folder) for folder in config.gpus.lock_dirs]
    return gpus.reserved(told, folders, Path(config.daemon.runtime_dir), shared=config.gpus.shared)


def _cuda(facts: Facts, told: Told) -> Finding:
    found = facts.installed
    asked = facts.engine_environ.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").strip().lower() in ("1", "true")
    return cuda.check(told.driver, told.cuda, found.cuda, found.torch, compatibility=asked)
