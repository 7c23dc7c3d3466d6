"""Checking a config against this host, before any GPU is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from math import prod
from pathlib import Path
from typing import Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.address import address
from mgpu_llm.config.arguments import argument_problems
from mgpu_llm.config.endpoint import listening
from mgpu_llm.config.fitting import Fitting, fit_problems, weight_problems
from mgpu_llm.config.launching import engine_command, tensor_parallel, to_base_launch
from mgpu_llm.config.listener import port_trouble, socket_trouble
from mgpu_llm.config.model import CONFIG_FILE, HUB_ID, MISTRAL_FILE, local_path, model_heads, read_model
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem, in_order, quoted
from mgpu_llm.core.ladder import Heads, splits
from mgpu_llm.core.launch import environment
from mgpu_llm.core.slices import ONE_SLICE, is_slice

_ASK_FOR_VLLM: Final = "import importlib.util as i, sys; sys.exit(0 if i.find_spec('vllm') else 3)"
_ASK_TIMEOUT_S: Final = 20.0
_NO_VLLM: Final = 3
#: By number: the user, its group, and all groups that it is in.
User = tuple[int, int, tuple[int, ...]]


def check(
    loaded: Loaded,
    environ: Mapping[str, str],
    *,
    gpu_count: int | None = None,
    fitted: Fitting | None = None,
    engine_runs: bool = False,
    engine_starts: bool = True,
    weights: bool = True,
    run_as: User | None = None,
) -> tuple[ConfigProblem, ...]:
    """All problems: those the config was loaded with, and what does not fit this host.

    `environ` is what the engine inherits. `gpu_count` is how many GPUs gpus.use turned out to be, None where nobody
    counted, and `fitted` whether the model fits them, where anybody knows. `engine_runs`: our own engine serves already, so
    its port is not free by right. Without `engine_starts` nobody asks whether there is an engine and where it could listen,
    and nothing is connected to or started; without `weights` nobody looks whether the files of weights are whole. `run_as` is
    who runs the engine's Python, None for ourselves.

    What seems wrong with a table that has problems already is left out, as is everything where a file is missing.
    Connects to the engine's port (1 s at most) and starts engine.python once (20 s at most).
    """
    if not loaded.complete:
        return loaded.problems
    found = [
        *_model(loaded),
        *(_engine(loaded, environ, run_as) if engine_starts else ()),
        *argument_problems(loaded),
        *(_address(loaded) if engine_starts and not engine_runs else ()),
        *_metrics(loaded),
        *_runtime_folder(loaded),
        *_gpus(loaded, environ, gpu_count),
    ]
    if not any(problem.table in ("model", "gpus", "engine") for problem in (*found, *loaded.problems)):
        broken = tuple(weight_problems(loaded, environ)) if weights else ()
        found += broken or fit_problems(loaded, environ, fitted)
    own = [problem for problem in found if not loaded.faulty(problem.table)]
    return in_order((*loaded.problems, *own))


def _model(loaded: Loaded) -> Iterator[ConfigProblem]:
    path, place = loaded.config.model.path, ("model", "path")
    expected = 'the folder of a model, or a hub id such as "Qwen/Qwen3-8B"'
    if not path:
        yield loaded.problem(place, "nothing", expected=expected)
    elif (folder := local_path(path)) is not None:
        yield from _local_model(loaded, folder)
    elif path.startswith(("http://", "https://")):
        hint = f"write {quoted('/'.join(path.split('/')[3:5]))}"
        yield loaded.problem(place, f"the address {quoted(path)}", expected=expected, hint=hint)
    elif "://" in path or HUB_ID.fullmatch(path):
        return  # s3:// and the like are between vLLM and its loader
    elif path.count("/") > 1:
        found = f"cannot read the model {quoted(path)}: no such folder, and no hub id"
        yield loaded.problem(place, found, hint="write the absolute path of its folder")
    else:
        yield loaded.problem(place, quoted(path), expected=expected)


def _local_model(loaded: Loaded, folder: Path) -> Iterator[ConfigProblem]:
    place, failed = ("model", "path"), f"cannot read the model {quoted(str(folder))}"
    try:
        if folder.suffix == ".gguf" and folder.is_file():
            return
        entries = sorted((entry.name for entry in folder.iterdir()), key=lambda name: (name.startswith("."), name))
    except FileNotFoundError:
        yield loaded.problem(place, f"{failed}: no such folder", hint=_similar(folder))
        return
    except NotADirectoryError:
        yield loaded.problem(place, f"{failed}: it is a file", hint="write the folder that it is in")
        return
    except OSError as error:
        yield loaded.problem(place, f"{failed}: {(error.strerror or str(error)).lower()}")
        return
    if CONFIG_FILE not in entries and MISTRAL_FILE not in entries:
        there = f"it has {_listed(entries)}" if entries else "the folder is empty"
        yield loaded.problem(place, f"{failed}: no {CONFIG_FILE} in it, {there}", hint=_deeper(folder))
        return
    if "--hf-config-path" in loaded.config.engine.args:
        return
    file = CONFIG_FILE if CONFIG_FILE in entries else MISTRAL_FILE
    try:
        read_model(folder)
    except OSError as error:
        yield loaded.problem(place, f"{failed}: its {file}: {(error.strerror or str(error)).lower()}")
    except ValueError as error:
        yield loaded.problem(place, f"{failed}: its {file}: {error}", hint="fetch the model anew")


def _engine(loaded: Loaded, environ: Mapping[str, str], run_as: User | None) -> Iterator[ConfigProblem]:
    engine = loaded.config.engine
    key = "command" if engine.command or not engine.python else "python"
    try:
        command = engine_command(engine, environ)
    except OSError as error:
        hint = "" if engine.command or engine.python else "set engine.python to the Python of vLLM's environment"
        yield loaded.problem(("engine", key), f"cannot find the engine: {error}", hint=hint)
        return
    whole = environment(environ, to_base_launch(loaded.config, None))
    if engine.python and _lacks_vllm(command[0], whole, run_as):
        found = f"cannot find the engine: {quoted(engine.python)} has no module vllm"
        yield loaded.problem(("engine", key), found, hint="write the Python of the environment that vLLM is in")


def _lacks_vllm(python: str, environ: Mapping[str, str], run_as: User | None) -> bool:
    """Whether a Python says that it has no vllm. One that says nothing, or fails otherwise, is given its chance."""
    try:
        asked = subprocess.run(
            [python, "-c", _ASK_FOR_VLLM],
            env=environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_ASK_TIMEOUT_S,
            check=False,
            user=None if run_as is None else run_as[0],
            group=None if run_as is None else run_as[1],
            extra_groups=None if run_as is None else run_as[2],
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == _NO_VLLM


def _address(loaded: Loaded) -> Iterator[ConfigProblem]:
    args, server = loaded.config.engine.args, listening(loaded.config)
    if server.uds is not None:
        if trouble := socket_trouble(server.uds):
            found = f"cannot listen on --uds {quoted(server.uds)}: {trouble}"
            yield loaded.problem(("engine", "args"), found)
        return
    if trouble := port_trouble(server.host, server.port):
        place = ("engine", "args" if options.has(args, options.PORT) else "port")
        where = f"port {server.port} of {quoted(server.host)}"
        yield loaded.problem(place, f"cannot listen on {where}: {trouble}", hint="free it, or set another")


def _metrics(loaded: Loaded) -> Iterator[ConfigProblem]:
    """The daemon is there first, and vLLM would fail of it."""
    where, server = address(loaded.config.metrics.listen), listening(loaded.config)
    if where is not None and server.uds is None and where[1] == server.port:
        found = quoted(loaded.config.metrics.listen)
        yield loaded.problem(("metrics", "listen"), found, expected=f"another port than the engine's, {server.port}")


def _runtime_folder(loaded: Loaded) -> Iterator[ConfigProblem]:
    """Only what no user could use: the one who checks need not be the one under whom the daemon runs."""
    folder = Path(loaded.config.daemon.runtime_dir)
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        usable = nearest.is_dir()
    except PermissionError:
        return  # not ours to see, and so perhaps not ours to use
    if not usable:
        yield loaded.problem(("daemon", "runtime_dir"), f"cannot be a folder: {quoted(str(nearest))} is none")


def _gpus(loaded: Loaded, environ: Mapping[str, str], gpu_count: int | None) -> Iterator[ConfigProblem]:
    count, heads = _count(loaded, gpu_count), model_heads(loaded.config, environ)
    if count == 0:
        yield loaded.problem(("gpus", "use"), '"all" on a host without GPUs', expected="GPUs", hint='write "none"')
        return
    yield from _tensor_parallel(loaded, count, heads)
    for index, rung in enumerate(loaded.config.ladder.rungs or ()):
        place = ("ladder", "rungs", index, "gpus")
        if rung.gpus is not None and count is not None and rung.gpus > count:
            yield loaded.problem(place, f"{rung.gpus}", expected=f"at most the {count} GPUs of gpus.use")
        elif rung.gpus is not None and not splits(rung.gpus, heads):
            yield loaded.problem(place, f"{rung.gpus}", expected=_fitting(heads), hint=_nearest(rung.gpus, heads))


def _tensor_parallel(loaded: Loaded, count: int | None, heads: Heads) -> Iterator[ConfigProblem]:
    place, size = ("gpus", "tensor_parallel"), tensor_parallel(loaded.config, count)
    if size is None:
        return
    times = _multipliers(loaded)
    most = size if count is None or times is None else count // prod(times.values())
    if most < size:
        ranks = " x ".join([f"{size}", *(f"{number} ({name})" for name, number in (times or {}).items())])
        one = isinstance(loaded.config.gpus.use, tuple) and is_slice(loaded.config.gpus.use[0])
        hint = _nearest(most, heads) if most else ONE_SLICE if one else "use more GPUs"
        yield loaded.problem(place, f"{ranks} ranks for {count} GPUs", expected="one GPU for each rank", hint=hint)
    if not splits(size, heads):
        auto = " (the number of GPUs)" if loaded.config.gpus.tensor_parallel == "auto" else ""
        hint = _nearest(min(size, most or size), heads)
        yield loaded.problem(place, f"{size}{auto}", expected=_fitting(heads), hint=hint)


def _multipliers(loaded: Loaded) -> dict[str, int] | None:
    """The options that multiply the ranks of tensor parallelism; None where ranks may live on other hosts."""
    args = loaded.config.engine.args
    if not options.one_host(args):
        return None
    return {option[0]: number for option, number in options.multipliers(args).items()}


def _count(loaded: Loaded, gpu_count: int | None) -> int | None:
    """How many GPUs there are, None where nobody knows or nobody asks for any."""
    match loaded.config.gpus.use:
        case "none":
            return None
        case "all":
            return gpu_count
        case chosen:
            return len(chosen)


def _fitting(heads: Heads) -> str:
    repeated = "" if heads.key_value is None else f" and {heads.key_value} key/value heads"
    return f"a number that splits the model's {heads.attention} attention heads{repeated}"


def _nearest(most: int, heads: Heads) -> str:
    return f"write {next(size for size in range(most, 0, -1) if splits(size, heads))}"


def _listed(entries: list[str], most: int = 6) -> str:
    names = ", ".join(quoted(name) for name in entries[:most])
    return names + (f" and {len(entries) - most} more" if len(entries) > most else "")


def _similar(folder: Path) -> str:
    """A folder of nearly that name."""
    try:
        close = get_close_matches(folder.name, [other.name for other in folder.parent.iterdir()], 1, 0.6)
    except OSError:
        return ""
    return f"did you mean {quoted(str(folder.parent / close[0]))}?" if close else ""


def _deeper(folder: Path) -> str:
    """A model further in: in a folder of its own, or where the hub's cache keeps it."""
    found = [*islice(folder.glob(f"*/{CONFIG_FILE}"), 2), *islice(folder.glob(f"snapshots/*/{CONFIG_FILE}"), 2)]
    return f"write {quoted(str(found[0].parent))}" if len(found) == 1 else ""
