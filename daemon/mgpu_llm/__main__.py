"""mgpud: arguments, config and environment in; the adapters and the loop out; an exit status that systemd understands."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import click
import structlog

import mgpu_llm
from mgpu_llm import assembly
from mgpu_llm.adapters import control_socket, gpus, journal
from mgpu_llm.adapters.console import Console
from mgpu_llm.adapters.engine.cgroup import find_delegated
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.engine.sweep import sweep_orphans
from mgpu_llm.adapters.gpus import Gpu, Gpus
from mgpu_llm.adapters.health import Probes
from mgpu_llm.adapters.systemd import SystemdNotifier, watchdog_interval_s
from mgpu_llm.config import checks, files, parse
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem, render
from mgpu_llm.core.effects import Exit
from mgpu_llm.core.launch import differences
from mgpu_llm.observer import Observer
from mgpu_llm.runner import Outside, Runner

#: Exit statuses besides the core's own (0, 65, 69): a fault of ours, "try again", and a wrong config (sysexits.h).
FAULT: Final = 70
TRY_AGAIN: Final = 75
BAD_CONFIG: Final = 78
LOCK_NAME: Final = "mgpud.lock"

log = structlog.get_logger()


@dataclass(frozen=True)
class CannotStartError(Exception):
    """The daemon cannot run: `message` for the operator, `status` for systemd."""

    status: int
    message: str


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=files.DEFAULT_PATH,
    show_default=True,
    help="The main config file; conf.d/*.toml beside it are laid over it.",
)
@click.option("--check", is_flag=True, help="Print every problem of the config and exit: 0 without problems, 78 with.")
@click.version_option(mgpu_llm.__version__, prog_name="mgpud")
def main(config_file: Path, *, check: bool) -> None:
    """Supervise a vLLM server: bring it to service, through stalls, and keep it there.

    \b
    Exit status: 0 stopped on request; 65 no retry can help; 69 gave up, the ladder is spent; 70 a fault in mgpud;
    75 try again (another daemon runs, or the driver cannot be reached); 78 the config is wrong.
    """
    notifier = SystemdNotifier(os.environ)
    try:
        sys.exit(asyncio.run(_check(config_file) if check else _supervise(config_file, notifier)))
    except CannotStartError as problem:
        click.echo(problem.message, err=True)
        # The first line is what `systemctl status` shows of a start that failed.
        notifier.status(problem.message.partition("\n")[0])
        sys.exit(problem.status)


async def _check(config_file: Path) -> int:
    loaded = parse.load(config_file)
    running = _locked_by(Path(loaded.config.daemon.runtime_dir))
    # The engine of a daemon that runs holds the port, as it should.
    problems = [*loaded.problems, *checks.check(loaded, os.environ, port_free=running is None)]
    inventory: Mapping[str, str] | None = None
    if not problems:
        try:
            inventory = await _resolve_gpus(loaded, Gpus())
        except CannotStartError as problem:
            raise CannotStartError(BAD_CONFIG, problem.message) from None
    _refuse(problems)
    planned = assembly.plan(loaded.config, inventory, os.environ)
    click.echo(f"{config_file}: no problems; the ladder has {len(planned.policy.rungs)} rungs:")
    for rung in planned.policy.rungs:
        changes = differences(planned.policy.rungs[0].launch, rung.launch)
        click.echo(f"  {rung.name}: {'; '.join(changes) or 'as configured'}")
    return 0


async def _supervise(config_file: Path, notifier: SystemdNotifier) -> int:
    loaded = parse.load(config_file)
    _refuse(loaded.problems)
    console = Console(sys.stderr)
    journal.configure(loaded.config.daemon.log_level, os.environ, sys.stderr, console.write)
    try:
        with _lock(Path(loaded.config.daemon.runtime_dir)):
            ended = await _run(loaded, notifier, console)
    finally:
        console.close()
    if ended.message:
        log.error("daemon.gave-up", message=ended.message, exit_status=ended.status)
        notifier.status(ended.message)
    return ended.status


async def _run(loaded: Loaded, notifier: SystemdNotifier, console: Console) -> Exit:
    clock, runtime_dir = time.monotonic, Path(loaded.config.daemon.runtime_dir)
    cgroup = find_delegated(os.environ)
    # Before the port is looked at: an engine of an earlier life may hold it.
    for told in await sweep_orphans(runtime_dir, clock=clock, deadline_s=10, cgroup=cgroup):
        log.warning("engine.orphan", what=told)
    _refuse(checks.check(loaded, os.environ))
    driver = Gpus()
    plan = assembly.plan(loaded.config, await _resolve_gpus(loaded, driver), os.environ)
    log.info("daemon.started", version=mgpu_llm.__version__, pid=os.getpid(), model=plan.identity.model, url=plan.identity.url)
    runner = Runner(plan.policy, plan.server, plan.identity, os.environ, clock)
    serving = loaded.config.serving
    probes = Probes(plan.endpoint, health_timeout_s=serving.probe_timeout, completion_timeout_s=serving.completion_timeout)
    outside = Outside(
        engine=EngineProcess(clock=clock, emit=runner.emit, runtime_dir=runtime_dir, cgroup=cgroup),
        observer=Observer(driver, plan.uuids, clock, runner.emit),
        probes=probes,
        notifier=notifier,
        console=console,
        watchdog_interval_s=watchdog_interval_s(os.environ),
    )
    async with control_socket.serving(runtime_dir, runner.backend(outside)):
        try:
            return await runner.run(outside)
        finally:
            await probes.close()


async def _resolve_gpus(loaded: Loaded, driver: Gpus) -> dict[str, str] | None:
    """The configured GPUs as {index: UUID}, in the config's order; None for an engine without GPUs.

    vLLM gets indices, because releases before 0.10 fail on UUIDs in CUDA_VISIBLE_DEVICES.
    """
    use = loaded.config.gpus.use
    if use == "none":
        return None
    try:
        inventory = await driver.inventory()
    except gpus.GpusUnobserved as silence:
        hint = 'set gpus.use = "none" for an engine without GPUs'
        raise CannotStartError(TRY_AGAIN, f"cannot see the GPUs: {silence.reason} ({hint})") from None
    try:
        chosen = _chosen(use, inventory)
        _refuse(checks.check_gpu_count(loaded, len(chosen)))
    except ValueError as error:
        problem = loaded.problem(("gpus", "use"), f"{error}")
        raise CannotStartError(BAD_CONFIG, render([problem])) from None
    return {str(gpu.index): gpu.uuid for gpu in chosen}


def _chosen(use: object, inventory: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    if not inventory:
        raise ValueError("this host has no GPU")
    return gpus.resolve(use if isinstance(use, tuple) else "all", inventory)


def _refuse(problems: tuple[ConfigProblem, ...] | list[ConfigProblem]) -> None:
    if problems:
        raise CannotStartError(BAD_CONFIG, render(problems))


def _lock(runtime_dir: Path) -> IO[str]:
    """One daemon a runtime folder. The kernel lets go of the lock when its holder dies, however it dies."""
    try:
        runtime_dir.mkdir(parents=True, exist_ok=True)
        lock = (runtime_dir / LOCK_NAME).open("a+", encoding="ascii")
    except OSError as error:
        message = f"cannot use the runtime folder '{runtime_dir}': {error.strerror}; set daemon.runtime_dir"
        raise CannotStartError(BAD_CONFIG, message) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        message = f"cannot start: another mgpud (pid {holder}) runs with '{runtime_dir}'; stop it, or set daemon.runtime_dir"
        raise CannotStartError(TRY_AGAIN, message) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _locked_by(runtime_dir: Path) -> str | None:
    """The pid of the daemon that holds the runtime folder, None when nobody does."""
    try:
        with (runtime_dir / LOCK_NAME).open(encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return lock.read().strip()
    except OSError:
        pass
    return None


if __name__ == "__main__":
    main()
