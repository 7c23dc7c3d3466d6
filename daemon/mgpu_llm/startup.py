"""From a config to the plan that the daemon runs with, or to why there is none, with all problems at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from mgpu_llm import assembly, host
from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from mgpu_llm.config import checks, launching
from mgpu_llm.config import engine_args as options
from mgpu_llm.config.fitting import Fitting, fitting
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem, render
from mgpu_llm.core import room, slices
from mgpu_llm.core.launch import environment
from mgpu_llm.core.preflight import When
from mgpu_llm.host import Found

#: Exit statuses for systemd: "try again", and a wrong config (sysexits.h).
TRY_AGAIN: Final = 75
BAD_CONFIG: Final = 78


class CannotStartError(Exception):
    """The daemon cannot run: `message` for the operator, `status` for systemd."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


async def checked(
    loaded: Loaded, driver: Gpus, environ: Mapping[str, str], *, engine_runs: bool = False
) -> assembly.Plan:
    """Check everything, GPUs included, and put the plan together. `environ` is what the engine inherits. Raises
    CannotStartError."""
    found, fitted = await _found(loaded, driver, environ, engine_runs=engine_runs)
    if not isinstance(found, Found):
        hint = 'an engine without GPUs needs gpus.use = "none"'
        raise CannotStartError(TRY_AGAIN, f"{found.reason} ({hint})")
    command = launching.engine_command(loaded.config.engine, environ)
    plan = assembly.plan(loaded.config, found, command, environ, fitted)
    await _slices_known(loaded, plan, environ)
    return plan


async def to_run(loaded: Loaded, driver: Gpus, environ: Mapping[str, str]) -> assembly.Plan:
    """The same for a daemon that will run, which remembers what served and on what, and draws its pauses. Raises
    CannotStartError."""
    plan = await checked(loaded, driver, environ)
    whole = environment(environ, plan.policy.ladder.base)
    asked = driver if plan.uuids else None
    versions = await host.find_versions(asked, plan.server.command, whole)
    key = assembly.key(plan, loaded.config, versions, environ)
    seed = int.from_bytes(os.urandom(4), "big")
    when = plan.policy.preflight
    if asked is not None and when is When.OVERLAP and await host.one_process_only(asked, plan.uuids.values()):
        when = When.BEFORE
    load_format = options.value(loaded.config.engine.args, options.LOAD_FORMAT)
    compared = room.is_compared(versions.vllm, load_format, whole)
    policy = replace(plan.policy, key=key, boot=versions.boot, seed=seed, preflight=when, free_is_compared=compared)
    return replace(plan, policy=policy, versions=versions)


async def foreseen(loaded: Loaded, driver: Gpus, environ: Mapping[str, str]) -> assembly.Plan:
    """The same for one that will not run: the engine may be missing, and the GPUs are taken as the config names them where the
    driver does not answer. Raises CannotStartError."""
    found, fitted = await _found(loaded, driver, environ, engine_starts=False)
    told = isinstance(found, Found)
    if not isinstance(found, Found):
        written = host.as_written(loaded.config)
        if written is None:
            hint = "to plan without the driver, write the indices of the GPUs into gpus.use"
            raise CannotStartError(TRY_AGAIN, f"{found.reason} ({hint})")
        found = written
    try:
        command = launching.engine_command(loaded.config.engine, environ)
    except OSError:
        command = launching.command_as_written(loaded.config.engine)
    return replace(assembly.plan(loaded.config, found, command, environ, fitted), driver_told=told)


async def _slices_known(loaded: Loaded, plan: assembly.Plan, environ: Mapping[str, str]) -> None:
    """Raises CannotStartError where a MIG slice is for a vLLM that is known not to take one."""
    if not any(map(slices.is_slice, plan.uuids)):
        return
    whole = environment(environ, plan.policy.ladder.base)
    vllm = (await host.find_versions(None, plan.server.command, whole)).vllm
    if slices.too_old(vllm):
        found = loaded.problem(("gpus", "use"), f"a MIG slice for vLLM {vllm}", expected=slices.least_vllm())
        raise CannotStartError(BAD_CONFIG, render([found]))


async def _found(
    loaded: Loaded,
    driver: Gpus,
    environ: Mapping[str, str],
    *,
    engine_runs: bool = False,
    engine_starts: bool = True,
) -> tuple[Found | GpusUnobserved, Fitting | None]:
    """The GPUs of a config without problems, and whether the model fits them. Raises CannotStartError with all that there
    are."""
    found = await host.find_gpus(loaded, driver)
    count = len(found.uuids) if isinstance(found, Found) and found.uuids is not None else None
    fitted = None
    if isinstance(found, Found) and loaded.complete:
        fitted = fitting(loaded.config, environ, found.memory_bytes)
    problems = checks.check(
        loaded,
        environ,
        gpu_count=count,
        fitted=fitted,
        engine_runs=engine_runs,
        engine_starts=engine_starts,
    )
    if isinstance(found, ConfigProblem):
        raise CannotStartError(BAD_CONFIG, render([*problems, found]))
    if problems:
        # Whoever mends the config is not to learn of the driver only then.
        silence = f"\n{found.reason}" if isinstance(found, GpusUnobserved) and loaded.complete else ""
        raise CannotStartError(BAD_CONFIG, render(problems) + silence)
    return found, fitted
