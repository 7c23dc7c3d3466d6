"""What engine arguments and variables must not say, because a key of the config or the daemon itself says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.document import Place
from mgpu_llm.config.engine_args import Option
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem, quoted
from mgpu_llm.core.launch import WITHHELD

#: Options that a key of the config decides, and that key.
_OWN_KEYS: Final[Mapping[Option, str]] = {
    options.MODEL: "model.path",
    options.TENSOR_PARALLEL: "gpus.tensor_parallel",
    options.UTILISATION: "gpus.memory_utilisation",
    options.DEVICES: "gpus.use",
}
_RUNG_KEYS: Final[Mapping[Option, str]] = {options.TENSOR_PARALLEL: "gpus", options.UTILISATION: "utilisation"}
_WITHOUT_API: Final = (options.HEADLESS, options.GRPC)
_CHOOSES_GPUS: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
#: What the daemon reads from the command line, and would miss in a file that only vLLM reads.
_FOLLOWED: Final = (*options.ENDPOINT, *_OWN_KEYS, *options.SEVERAL_HOSTS, options.PIPELINE_PARALLEL, *_WITHOUT_API)


def argument_problems(loaded: Loaded) -> Iterator[ConfigProblem]:
    """All that is wrong with engine.args, engine.env and those of the rungs."""
    engine = loaded.config.engine
    yield from _refused(loaded, ("engine", "args"), engine.args, _OWN_KEYS)
    yield from _served_name(loaded)
    yield from _port(loaded)
    yield from _certificates(loaded)
    yield from _config_file(loaded)
    forbidden = WITHHELD if loaded.config.gpus.use == "none" else WITHHELD.union(_CHOOSES_GPUS)
    yield from _variables(loaded, ("engine", "env"), engine.env, forbidden)
    for index, rung in enumerate(loaded.config.ladder.rungs or ()):
        place: Place = ("ladder", "rungs", index)
        yield from _refused(loaded, (*place, "args"), rung.args, {**_OWN_KEYS, **_RUNG_KEYS})
        for option in (*options.ENDPOINT, options.CONFIG_FILE):
            if options.has(rung.args, option):
                yield loaded.problem(
                    (*place, "args"), f"{option[0]} is the same on every rung", hint="set it in engine.args"
                )
        yield from _variables(loaded, (*place, "env"), rung.env, WITHHELD.union(_CHOOSES_GPUS, {"VLLM_API_KEY"}))


def _refused(loaded: Loaded, place: Place, args: tuple[str, ...], own: Mapping[Option, str]) -> Iterator[ConfigProblem]:
    for option, key in own.items():
        if options.has(args, option):
            yield loaded.problem(
                place, f"{option[0]} has a key of its own here", hint=f"remove it from the arguments and set {key}"
            )
    for option in _WITHOUT_API:
        if options.has(args, option):
            yield loaded.problem(
                place,
                f"with {option[0]} vLLM has no HTTP API, and the daemon could never see it ready",
                hint="remove it",
            )


def _served_name(loaded: Loaded) -> Iterator[ConfigProblem]:
    if loaded.config.model.served_name and options.has(loaded.config.engine.args, options.SERVED_NAME):
        yield loaded.problem(
            ("model", "served_name"), "engine.args has --served-model-name already", hint="keep one of them"
        )


def _port(loaded: Loaded) -> Iterator[ConfigProblem]:
    args = loaded.config.engine.args
    if options.has(args, options.PORT) and options.port(args) is None:
        found = f"--port {quoted(options.value(args, options.PORT) or '')}"
        yield loaded.problem(("engine", "args"), found, expected="a port from 1 to 65535")


def _certificates(loaded: Loaded) -> Iterator[ConfigProblem]:
    args, place = loaded.config.engine.args, ("engine", "args")
    for option in (options.CERTIFICATE, options.CERTIFICATE_KEY):
        name = options.value(args, option)
        if name is not None and (why := _unreadable(name)):
            yield loaded.problem(place, f"cannot read {option[0]} {quoted(name)}: {why}")
    if options.has(args, options.CERTIFICATE_KEY) and not options.has(args, options.CERTIFICATE):
        yield loaded.problem(place, "--ssl-keyfile alone", expected="--ssl-certfile with it")
    if options.value(args, options.CLIENT_CERTIFICATES) == "2":
        yield loaded.problem(
            place,
            "--ssl-cert-reqs 2 demands a certificate of every client, and the daemon's probes have none",
            hint="write 1, and let a proxy demand it",
        )


def _config_file(loaded: Loaded) -> Iterator[ConfigProblem]:
    name = options.value(loaded.config.engine.args, options.CONFIG_FILE)
    if name is None:
        return
    if why := _unreadable(name):
        yield loaded.problem(("engine", "args"), f"cannot read --config {quoted(name)}: {why}")
        return
    there = options.options_in_yaml(Path(name).read_text(encoding="utf-8", errors="replace"))
    if missed := sorted(there.intersection(name for option in _FOLLOWED for name in option)):
        yield loaded.problem(
            ("engine", "args"),
            f"the daemon does not read --config {quoted(name)}, which sets {', '.join(missed)}",
            hint="move these to engine.args, or to their own keys here",
        )


def _variables(
    loaded: Loaded, place: Place, env: Mapping[str, str], forbidden: frozenset[str]
) -> Iterator[ConfigProblem]:
    for name in sorted(forbidden.intersection(env)):
        own = "set gpus.use" if name in _CHOOSES_GPUS else "set it in [engine.env]"
        theirs = f"{name} belongs to the daemon" if name in WITHHELD else f"{name} does not belong here"
        yield loaded.problem((*place, name), theirs, hint="remove it" if name in WITHHELD else f"remove it and {own}")


def _unreadable(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            file.read(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""
