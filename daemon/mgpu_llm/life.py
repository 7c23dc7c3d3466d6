"""One life of the daemon: a config in, everything put together and run, and an exit status."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

import mgpu_llm
from mgpu_llm import assembly, reservation, startup
from mgpu_llm.adapters import control_socket, instance_lock, journal, metrics, state_dir
from mgpu_llm.adapters.console import Console
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.cgroup import find_delegated
from mgpu_llm.adapters.engine.ledger import Ledger
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.engine.sweep import sweep_orphans
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.health import Probes
from mgpu_llm.adapters.host import kernel_follower
from mgpu_llm.adapters.incidents import Incidents
from mgpu_llm.adapters.memory.history import History
from mgpu_llm.adapters.memory.known_good import KnownGoodRung
from mgpu_llm.adapters.memory.preflight import PassedPreflights
from mgpu_llm.adapters.preflight import Preflight
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.adapters.systemd import SystemdNotifier, watchdog_interval_s
from mgpu_llm.chronicle import Chronicle
from mgpu_llm.collector import Collector
from mgpu_llm.config import parse
from mgpu_llm.config.address import address
from mgpu_llm.config.listener import port_trouble, trouble
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import render
from mgpu_llm.core import kernel
from mgpu_llm.core.effects import Exit
from mgpu_llm.core.events import Event
from mgpu_llm.gpu_baseline import Baseline
from mgpu_llm.gpu_json import GpuReport
from mgpu_llm.observer import Observer
from mgpu_llm.performer import Outside
from mgpu_llm.reloading import Reloading
from mgpu_llm.remains import Remains
from mgpu_llm.runner import Audience, Runner
from mgpu_llm.startup import BAD_CONFIG, TRY_AGAIN, CannotStartError

#: How long the last words may take to reach a disk that may be stuck.
CLOSE_S: Final = 6.0
#: What a killed daemon has left among the incidents is removed first, unless the disk does not answer.
ADOPT_S: Final = 5.0
#: To find out who has the port of the metrics.
WHY_S: Final = 3.0
#: Of a lost GPU that the config does not name: it is in the way all the same (vLLM 0.32.0, platforms/cuda.py, log_warnings).
_NAMED_AT_IMPORT: Final = (
    "not used here, but vLLM (up to 0.32 at least) asks all GPUs of the host at its import, and ends if one is lost"
)

#: How often, and for how long, a start is tried for which something is not there yet. With RestartSec= of the unit, ten such
#: starts are longer than StartLimitIntervalSec=: systemd goes on for as long as it takes.
TRY_EVERY_S: Final = 10.0
TRIED_S: Final = 180.0
#: What one try takes at most: the driver may be silent, and the config lie on a slow disk.
BEGIN_S: Final = 60.0

log = structlog.get_logger()


async def supervise(config_file: Path, notifier: SystemdNotifier) -> int:
    """Supervise an engine until somebody or something ends that; returns the exit status. Raises CannotStartError; under systemd
    not before what another try may cure was tried for a while: systemd itself gives up after a few quick ones."""
    give_up_at, told = time.monotonic() + (TRIED_S if _is_a_service(os.environ) else 0), ""
    while True:
        try:
            return await _supervise(config_file, notifier)
        except CannotStartError as problem:
            if problem.status != TRY_AGAIN or time.monotonic() >= give_up_at:
                raise
            if problem.message != told:
                log.warning("daemon.waiting", why=problem.message, next=f"tried again every {TRY_EVERY_S:g} s")
                told = problem.message
            notifier.status(f"waiting: {problem.message}".partition("\n")[0])
            notifier.extend_timeout(TRY_EVERY_S + BEGIN_S)
            await asyncio.sleep(TRY_EVERY_S)


def _is_a_service(environ: Mapping[str, str]) -> bool:
    """Whether systemd itself has begun this very process (248 and later)."""
    return environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


async def _supervise(config_file: Path, notifier: SystemdNotifier) -> int:
    loaded = parse.load(config_file)
    if not loaded.complete:
        raise CannotStartError(BAD_CONFIG, render(loaded.problems))
    runtime_dir = Path(loaded.config.daemon.runtime_dir)
    console = Console(sys.stderr)
    journal.configure(loaded.config.daemon.log_level, os.environ, sys.stderr, console.write)
    try:
        with _locked(runtime_dir), state_dir.held(Path(loaded.config.daemon.state_dir)) as state, ExitStack() as gpus:
            ended = await _run(loaded, notifier, console, state, lambda plan: _reserve(gpus, loaded, plan, config_file))
    finally:
        console.close()
    if ended.message:
        log.error("daemon.gave-up", message=ended.message, exit_status=ended.status)
        notifier.status(ended.message)
    return ended.status


@contextmanager
def _locked(runtime_dir: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(instance_lock.held(runtime_dir))
        except instance_lock.HeldError as other:
            why = f"cannot start: another mgpud (pid {other.pid}) runs with '{runtime_dir}'; stop it, or set daemon.runtime_dir"
            raise CannotStartError(TRY_AGAIN, why) from None
        except OSError as error:
            cure = f"set daemon.runtime_dir{state_dir.sandboxed(error, runtime_dir)}"
            why = f"cannot use the runtime folder '{runtime_dir}': {error.strerror}; {cure}"
            raise CannotStartError(BAD_CONFIG, why) from None
        yield


def _reserve(gpus: ExitStack, loaded: Loaded, plan: assembly.Plan, config_file: Path) -> None:
    gpus.enter_context(reservation.held(loaded, plan, config_file))


async def _run(
    loaded: Loaded,
    notifier: SystemdNotifier,
    console: Console,
    state: Path | None,
    reserve: Callable[[assembly.Plan], None],
) -> Exit:
    clock, runtime_dir = time.monotonic, Path(loaded.config.daemon.runtime_dir)
    cgroup = find_delegated(os.environ)
    # Before the port is looked at: an engine of an earlier life may hold it.
    ledger = Ledger(state or runtime_dir)
    for told in await sweep_orphans(runtime_dir, clock=clock, deadline_s=10, cgroup=cgroup, ledger=ledger):
        log.warning("engine.orphan", what=told)
    driver = Gpus()
    plan = await startup.to_run(loaded, driver, os.environ)
    reserve(plan)
    log.info(
        "daemon.started",
        version=mgpu_llm.__version__,
        pid=os.getpid(),
        model=plan.identity.model,
        url=plan.identity.url,
    )
    for gpu, why in plan.lost.items():
        log.warning("gpu.lost", gpu=gpu, why=why, consequence=_NAMED_AT_IMPORT)
    events: asyncio.Queue[Event] = asyncio.Queue()
    follow = partial(kernel_follower.follow, clock, kernel.tells)
    observer = Observer(driver, plan.uuids, clock, events.put_nowait, follow)
    baseline = Baseline(driver, plan.uuids, clock, observer.tell)
    kill_deadline_s = plan.policy.kill_deadline_s
    engine = EngineProcess(
        clock=clock,
        emit=baseline.tell,
        runtime_dir=runtime_dir,
        cgroup=cgroup,
        before_gone=lambda _: baseline.wait_until_free(kill_deadline_s),
    )
    serving = loaded.config.serving
    probes = Probes(
        plan.endpoint, health_timeout_s=serving.probe_timeout, completion_timeout_s=serving.completion_timeout
    )
    chronicle = _chronicle(loaded, plan, state)
    incidents = await _incidents(loaded, state)
    passed = PassedPreflights(state if loaded.config.preflight.remember else None)
    outside = Outside(
        server=plan.server,
        url=plan.identity.url,
        environment=os.environ,
        engine=engine,
        observer=observer,
        baseline=baseline,
        remains=Remains(ledger, engine.pids),
        preflight=_preflight(loaded, plan, passed),
        uuids=plan.uuids,
        probes=probes,
        chronicle=chronicle,
        collector=_collector(plan, engine, driver, incidents, chronicle),
        incidents=incidents,
        nccl_folder=runtime_dir / "nccl",
        kill_deadline_s=kill_deadline_s,
        engine_socket=Path(plan.listening.uds) if plan.listening.uds else None,
        address_trouble=lambda: trouble(plan.listening),
    )
    audience = Audience(notifier=notifier, console=console, watchdog_interval_s=watchdog_interval_s(os.environ))
    policy = replace(plan.policy, past=chronicle.past, incidents=str(incidents.folder or ""))
    chronicle.forget_outdated(policy)
    report, reloading = GpuReport(driver), _reloading(loaded, plan, probes)
    runner = Runner(policy, plan.identity, clock, events, outside, audience, report, reloading, plan.out)
    async with control_socket.serving(runtime_dir, runner), _metrics(loaded, runner):
        try:
            return await runner.run()
        finally:
            await probes.close()
            await aside(chronicle.close, CLOSE_S)
            await aside(passed.close, CLOSE_S)
            # NCCL's own words were evidence for as long as there was an engine.
            await aside(lambda: shutil.rmtree(runtime_dir / "nccl", ignore_errors=True), CLOSE_S)


def _reloading(loaded: Loaded, plan: assembly.Plan, probes: Probes) -> Reloading:
    gpus = plan.policy.ladder.base.gpus
    return Reloading(loaded, os.environ, None if gpus is None else len(gpus), probes)


def _metrics(loaded: Loaded, runner: Runner) -> AbstractAsyncContextManager[None]:
    where = address(loaded.config.metrics.listen)
    return metrics.serving(where, runner.metrics, lambda host, port: aside(lambda: port_trouble(host, port), WHY_S))


def _chronicle(loaded: Loaded, plan: assembly.Plan, state: Path | None) -> Chronicle:
    records = loaded.config.records
    return Chronicle(
        Recorder(state and state / "records", keep=records.keep, max_bytes=records.max_size << 20),
        History(state),
        KnownGoodRung(state if loaded.config.ladder.remember else None),
        plan.identity.model,
    )


def _preflight(loaded: Loaded, plan: assembly.Plan, passed: PassedPreflights) -> Preflight:
    settings, versions = loaded.config.preflight, plan.versions
    key = {"boot": versions.boot, "driver": versions.driver, "torch": versions.torch, "nccl": versions.nccl}
    return Preflight(
        python=versions.python,
        memory=passed if settings.remember else None,
        key=key,
        deadline_s=settings.deadline,
        clock=time.monotonic,
    )


def _collector(
    plan: assembly.Plan, engine: EngineProcess, driver: Gpus, incidents: Incidents, chronicle: Chronicle
) -> Collector:
    return Collector(
        engine=engine,
        gpus=driver,
        incidents=incidents,
        recording=chronicle.recording,
        model=plan.server.model,
        state_dir=str(plan.state_dir),
    )


async def _incidents(loaded: Loaded, state: Path | None) -> Incidents:
    kept = loaded.config.incidents
    incidents = Incidents(state and state / "incidents", keep=kept.keep, max_bytes=kept.max_size << 20)
    await aside(incidents.adopt, ADOPT_S)
    return incidents
