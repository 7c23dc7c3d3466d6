"""From the config to what the core works with: server, base launch, patience."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.model import expanded, local_path
from mgpu_llm.config.schema import Config, EngineSettings
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.launch import Launch, Server

#: `vllm serve` as a module: it needs no `vllm` script, which an environment on PYTHONPATH does not have.
VIA_MODULE: Final = ("-m", "vllm.entrypoints.cli.main", "serve")


def engine_command(engine: EngineSettings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The argv up to the model, its program by absolute path; looked for in the engine's PATH.

    Raises FileNotFoundError or PermissionError, whose text says what is missing.
    """
    search = {**environ, **engine.env}.get("PATH", os.defpath)
    if engine.command:
        return (_program(engine.command[0], search), *engine.command[1:])
    if engine.python:
        return (_program(engine.python, search), *VIA_MODULE)
    if own_python_has_vllm():
        return (sys.executable, *VIA_MODULE)
    if found := shutil.which("vllm", path=search):
        return (str(Path(found).absolute()), "serve")
    raise FileNotFoundError("neither this Python nor the PATH has vllm")


def own_python_has_vllm() -> bool:
    """Whether the daemon's own environment has vLLM, without importing it. A bare folder `vllm` is none."""
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None


def command_as_written(engine: EngineSettings) -> tuple[str, ...]:
    """The same where the engine need not be on this host."""
    return engine.command or ((engine.python, *VIA_MODULE) if engine.python else ("vllm", "serve"))


def to_server(config: Config, command: tuple[str, ...]) -> Server:
    """What stays the same on every rung. `command` is the argv up to the model."""
    args, path = config.engine.args, local_path(config.model.path)
    return Server(
        command=command,
        model=config.model.path if path is None else str(path),
        served_name="" if options.has(args, options.SERVED_NAME) else config.model.served_name,
        host=None if options.has(args, options.HOST) else config.engine.host,
        port=None if options.has(args, options.PORT) else config.engine.port,
    )


def tensor_parallel(config: Config, gpu_count: int | None) -> int | None:
    """How many ranks one layer is split over; None while the number of GPUs is unknown and decides it."""
    if config.gpus.tensor_parallel != "auto":
        return config.gpus.tensor_parallel
    return 1 if config.gpus.use == "none" else gpu_count


def to_base_launch(config: Config, gpus: tuple[str, ...] | None) -> Launch:
    """The launch of the base rung. `gpus` are the resolved GPUs in the config's order, None for use = "none"."""
    return Launch(
        gpus=gpus,
        tensor_parallel=tensor_parallel(config, len(gpus or ())) or 1,
        # Without GPUs the fraction means nothing, and a ladder that lowers it would be for show.
        utilisation=None if gpus is None else config.gpus.memory_utilisation,
        env=config.engine.env,
        args=config.engine.args,
    )


def to_patience(config: Config) -> dict[Phase, float]:
    """Seconds in which nothing may move, by phase of the load."""
    return {Phase[name.upper()]: seconds for name, seconds in config.patience}


def _program(name: str, search: str) -> str:
    """The absolute path of a program. Links stay: a virtual environment's Python is one, and is nothing without."""
    if found := shutil.which(str(expanded(name)) if name.startswith("~") else name, path=search):
        return str(Path(found).absolute())
    if "/" not in name:
        raise FileNotFoundError(f'no program "{name}" on the PATH "{search}"')
    try:
        mode = Path(name).stat().st_mode
    except PermissionError as error:
        raise PermissionError(f'"{name}" is in a folder that this user may not search') from error
    except OSError as error:
        raise FileNotFoundError(f'no such file "{name}"') from error
    raise PermissionError(f'"{name}" is {"a folder" if stat.S_ISDIR(mode) else "not executable"}')
