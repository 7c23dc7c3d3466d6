"""The GPUs of this instance, which no other uses unless both share them."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from mgpu_llm.adapters import gpu_locks
from mgpu_llm.adapters.gpu_locks import HeldError, Holder, SpoiltError
from mgpu_llm.assembly import Plan
from mgpu_llm.config.parse import Loaded
from mgpu_llm.startup import TRY_AGAIN, CannotStartError

log = structlog.get_logger()


@contextmanager
def held(loaded: Loaded, plan: Plan, config_file: Path) -> Iterator[None]:
    """Hold the plan's GPUs and spares, for as long as this is entered. Raises CannotStartError.

    With the status that asks for another try: the other instance may end, or the lock file be put right, without any change
    of this config.
    """
    folders, shared = _folders(loaded), loaded.config.gpus.shared
    me = Holder(
        pid=os.getpid(),
        user=_user(os.geteuid()),
        config=str(config_file.absolute()),
        runtime_dir=str(plan.runtime_dir.resolve()),
        shared=shared,
    )
    names = _names(plan)
    partly = {whole for whole, parts in plan.parts.items() if not set(parts).isdisjoint(plan.uuids.values())}
    try:
        with gpu_locks.held(folders, names.keys() - partly, me, partly) as unusable:
            _tell(folders, unusable)
            yield
    except HeldError as other:
        why = (
            f"cannot reserve GPU {names[other.uuid]} ({other.uuid}): {in_words(other.holders)}; {_cure(other, shared)}"
        )
        raise CannotStartError(TRY_AGAIN, why) from None
    except SpoiltError as spoilt:
        why = f"cannot reserve GPU {names[spoilt.uuid]} ({spoilt.uuid}): {spoilt.why}"
        raise CannotStartError(TRY_AGAIN, why) from None


def remarks(loaded: Loaded, plan: Plan) -> tuple[str, ...]:
    """A sentence for each GPU that somebody holds now: this config's own instance, or another, which is in the way unless both
    share. Before that, where nothing can be reserved by this user, why."""
    own, shared = str(plan.runtime_dir.resolve()), loaded.config.gpus.shared
    found = [*_unusable(_folders(loaded))] if plan.uuids else []
    for name, uuid in plan.uuids.items():
        others = gpu_locks.holders(_folders(loaded), uuid)
        mine = [holder for holder in others if holder.runtime_dir == own]
        strangers = tuple(holder for holder in others if holder.runtime_dir != own)
        if mine:
            found.append(f"GPU {name} is reserved by the mgpud of this config (pid {mine[0].pid})")
        if strangers:
            may = shared and all(holder.shared for holder in strangers)
            ends = "" if may else f"; until that ends, mgpud ends with exit status {TRY_AGAIN}"
            found.append(f"GPU {name}: {in_words(strangers)}{ends}")
    return tuple(found)


def _unusable(folders: list[Path]) -> Iterator[str]:
    if any(folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) for folder in folders):
        return
    why = [(folder, "this user may not write there" if folder.is_dir() else "no such folder") for folder in folders]
    told = "; ".join(f"'{folder}': {reason}" for folder, reason in why)
    yield f"GPUs cannot be reserved, and other instances may take them ({told}); set gpus.lock_dirs"


def _names(plan: Plan) -> dict[str, str]:
    """Everything that is reserved, by UUID, with the entry for which it is: the GPUs, all slices of those that we want whole, and
    the GPUs that our slices are of."""
    names = dict[str, str]()
    for name, uuid in plan.uuids.items():
        wholes = [whole for whole, parts in plan.parts.items() if uuid in parts]
        names |= dict.fromkeys((uuid, *plan.parts.get(uuid, ()), *wholes), name)
    return names


def in_words(holders: tuple[Holder, ...]) -> str:
    whose = " and ".join(f"({holder})" for holder in holders)
    return f"another mgpud uses it {whose}" if len(holders) == 1 else f"{len(holders)} other mgpud use it: {whose}"


def _cure(other: HeldError, shared: bool) -> str:
    where = "in both configs"
    if shared:
        where = "in its config, too"
    elif all(holder.shared for holder in other.holders):
        where = "here, as it is there"
    return f"name other GPUs in gpus.use or gpus.spares, or set gpus.shared = true {where}"


def _tell(folders: list[Path], unusable: dict[str, str]) -> None:
    if not unusable:
        return
    why = "; ".join(f"'{folder}': {reason}" for folder, reason in unusable.items())
    left = [str(folder) for folder in folders if str(folder) not in unusable]
    consequence = (
        f"GPUs are reserved in {', '.join(left)} alone: instances that cannot use it may take them"
        if left
        else "GPUs are not reserved: other instances may take them; set gpus.lock_dirs"
    )
    log.warning("gpus.locks-unusable", why=why, consequence=consequence)


def _folders(loaded: Loaded) -> list[Path]:
    return [Path(folder) for folder in loaded.config.gpus.lock_dirs]


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
