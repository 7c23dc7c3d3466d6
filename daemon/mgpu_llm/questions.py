"""What mgpud answers without supervising anything: whether the config is right, what it comes to, and what would be tried."""

from __future__ import annotations

import json
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import click

from mgpu_llm import probing, reservation, startup
from mgpu_llm.adapters import instance_lock, state_dir, streams
from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from mgpu_llm.assembly import Plan
from mgpu_llm.config import effective, files, fitting, parse
from mgpu_llm.config.json_schema import json_schema
from mgpu_llm.core import planning, unusable
from mgpu_llm.core.launch import differences
from mgpu_llm.core.states import Fail, Run
from mgpu_llm.doctor import finding
from mgpu_llm.doctor.account import account
from mgpu_llm.doctor.examination import examine
from mgpu_llm.doctor.facts import Patient
from mgpu_llm.gpu_json import GpuReport
from mgpu_llm.plan_json import plan_to_json
from mgpu_llm.startup import BAD_CONFIG, TRY_AGAIN, CannotStartError

#: The exit status of a wrong command line, as click has it.
WRONG_COMMAND: Final = 2
#: The first question wakes the GPUs, which takes seconds where nothing keeps them awake.
GPUS_S: Final = 15.0


async def plan(config_file: Path, cause: str) -> int:
    """Print as JSON what would be tried against a cause; returns the exit status. Raises CannotStartError."""
    planned = await startup.foreseen(parse.load(config_file), Gpus(), os.environ)
    try:
        document = plan_to_json(planned.policy, cause, planned.out)
    except ValueError as error:
        near = get_close_matches(cause, planning.causes(), 1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise CannotStartError(WRONG_COMMAND, f"cannot plan: {error}{hint}") from None
    if not planned.driver_told:
        click.echo(
            "remark: planned without the NVIDIA driver: which GPUs NVLink joins, and whether fewer GPUs hold the weights, is not "
            "known here; on the host the plan may differ",
            err=True,
        )
    _tell_lost(planned)
    _print(json.dumps(document, indent=2))
    return 0


async def doctor(config_file: Path, user: str | None, *, probe: bool = False, force: bool = False) -> int:
    """Print as JSON what on this host would make a start fail; returns the exit status. `probe` lets the GPUs work, `force` also
    where somebody uses them. Raises CannotStartError."""
    try:
        who = account(user)
    except LookupError as error:
        raise CannotStartError(WRONG_COMMAND, f"cannot examine this host: {error}") from None
    loaded = parse.load(config_file) if config_file != files.DEFAULT_PATH or _is_there(config_file) else None
    patient = Patient(loaded=loaded, who=who, environ=os.environ)
    driver = Gpus()
    found = await examine(patient, driver)
    if probe:
        found += await probing.probed(loaded, driver, os.environ, force=force)
    told = finding.document(found, user=who.name, config="" if loaded is None else str(config_file))
    _print(json.dumps(told, indent=2))
    return 0


async def gpus(deadline_s: float = GPUS_S) -> int:
    """Print as JSON the GPUs of this host, who uses them and what joins them; returns the exit status. Raises
    CannotStartError."""
    try:
        document = await GpuReport(Gpus()).document(deadline_s)
    except GpusUnobserved as silence:
        raise CannotStartError(TRY_AGAIN, silence.reason) from None
    _print(json.dumps(document, indent=2))
    return 0


async def config(config_file: Path) -> int:
    """Print as JSON the values that the config comes to, where each is from, and the problems that show in the files; returns the
    exit status. Raises CannotStartError."""
    document = effective.document(config_file)
    _print(json.dumps(document, indent=2))
    return BAD_CONFIG if document["problems"] else 0


async def schema() -> int:
    """Print the config's JSON schema; returns the exit status. Raises CannotStartError."""
    _print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0


async def check(config_file: Path) -> int:
    """Print every problem of the config, or the ladder under it; returns the exit status. Raises CannotStartError."""
    loaded = parse.load(config_file)
    # The engine of a daemon that runs holds the port, as it should.
    running = instance_lock.holder(Path(loaded.config.daemon.runtime_dir)) is not None
    planned = await startup.checked(loaded, Gpus(), os.environ, engine_runs=running)
    policy = planned.policy
    rungs = [step.rung for step in planning.plans(policy, out=planned.out)[0].rungs]
    if isinstance(begins := planned.begins(), Fail):
        raise CannotStartError(begins.status, begins.message)
    lines = [f"{config_file}: no problems; for a cause that nobody knows the ladder has {len(rungs)} rungs:"]
    for rung in rungs:
        changes = differences(policy.ladder.base, policy.launch(rung))
        lines += [f"  {rung.name}: {'; '.join(changes) or 'as configured'}"]
    fitted = planned.fitting
    lines += [f"  {line}" for line in (fitting.lines(fitted) if fitted is not None else ())]
    _print("\n".join(lines))
    _tell_lost(planned)
    # What our own engine holds is no news.
    for remark in () if fitted is None else fitting.remarks(fitted, {} if running else planned.held_bytes):
        streams.tell(f"remark: {remark}", sys.stderr)
    for remark in reservation.remarks(loaded, planned):
        streams.tell(f"remark: {remark}", sys.stderr)
    if remark := state_dir.foreseen(planned.state_dir):
        streams.tell(f"remark: {remark}", sys.stderr)
    return 0


def _tell_lost(planned: Plan) -> None:
    elsewhere = [f"GPU {gpu} is lost, and this config does not name it: {why}" for gpu, why in planned.lost.items()]
    for remark in (*unusable.in_words(Run(out=planned.out)), *elsewhere):
        streams.tell(f"remark: {remark}", sys.stderr)


def _is_there(file: Path) -> bool:
    """Also where it cannot be reached: then it is a problem of its own."""
    try:
        return file.exists() or file.is_symlink()
    except PermissionError:
        return True


def _print(text: str) -> None:
    if why := streams.tell(text, sys.stdout):
        raise CannotStartError(TRY_AGAIN, f"cannot write the result: {why}")
