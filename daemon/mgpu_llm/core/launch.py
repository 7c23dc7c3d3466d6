"""The settings of one attempt, and the command line and environment they become."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

#: Variables that belong to the supervisor and must never reach the engine: an engine that holds NOTIFY_SOCKET could
#: answer systemd in our place, and the others describe the daemon's own life.
WITHHELD = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"})


#: Options and variables whose values stay out of logs and status.
SECRET: Final = re.compile(r"[\w-]*(?:api[-_]key|token|secret|password|secret[-_]access[-_]key)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Server:
    """What stays the same on every rung: how the engine is called and where it listens.

    `command` is the argv up to the model, such as ("/opt/vllm/bin/vllm", "serve"). An empty `served_name` leaves the
    name to vLLM (the model's path). `host` and `port` are None where `args` already give them.
    """

    command: tuple[str, ...]
    model: str
    served_name: str = ""
    host: str | None = "127.0.0.1"
    port: int | None = 8000


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One attempt's settings. `gpus` are the entries of CUDA_VISIBLE_DEVICES in order; None leaves it alone (no GPU).

    `utilisation` is a fraction of each GPU's memory, None leaves vLLM's default. `env` overrides the inherited
    environment, `args` are appended to the command line.
    """

    gpus: tuple[str, ...] | None
    tensor_parallel: int
    utilisation: float | None
    env: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()


def argv(server: Server, launch: Launch) -> tuple[str, ...]:
    """The engine's whole command line, in the form of `vllm serve` (the same in vLLM 0.8.4 to 0.33.0)."""
    parts = [*server.command, server.model, "--tensor-parallel-size", str(launch.tensor_parallel)]
    if launch.utilisation is not None:
        parts += ["--gpu-memory-utilization", f"{launch.utilisation:g}"]
    if server.served_name:
        parts += ["--served-model-name", server.served_name]
    if server.host is not None:
        parts += ["--host", server.host]
    if server.port is not None:
        parts += ["--port", str(server.port)]
    return (*parts, *launch.args)


def shown(argv: Sequence[str]) -> str:
    """The command line as it may be logged: quoted for a shell, the values of options that name a secret left out."""
    words, hiding = list[str](), False
    for word in argv:
        option, _, value = word.partition("=")
        if word.startswith("-"):
            hiding = SECRET.fullmatch(option) is not None
            words.append(f"{option}=..." if hiding and value else word)
        else:
            words.append("..." if hiding else word)
    return shlex.join(words)


def environment(inherited: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The engine's whole environment: what the daemon has, less what is the daemon's own, plus the launch's.

    CUDA numbers GPUs fastest first unless CUDA_DEVICE_ORDER says otherwise, while nvidia-smi and NVML number them by
    PCI address; without it "GPU 2" would be another card in the config than in the engine.
    """
    env = {name: value for name, value in inherited.items() if name not in WITHHELD}
    env["PYTHONUNBUFFERED"] = "1"
    if launch.gpus is not None:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    env.update(launch.env)
    return env


def differences(base: Launch, launch: Launch) -> tuple[str, ...]:
    """What a launch changes against the base, one readable change each ("NCCL_P2P_DISABLE=1", "2 GPUs -> 1")."""
    changes = [_set(name, value) for name, value in launch.env.items() if base.env.get(name) != value]
    changes += [f"{name} unset" for name in base.env if name not in launch.env]
    changes += [shown(added)] if (added := _added_args(base.args, launch.args)) else []
    if base.utilisation != launch.utilisation:
        changes.append(f"--gpu-memory-utilization {_shown(base.utilisation)} -> {_shown(launch.utilisation)}")
    if base.gpus != launch.gpus:
        changes.append(f"GPUs {','.join(base.gpus or ())} -> {','.join(launch.gpus or ())}")
    if base.tensor_parallel != launch.tensor_parallel:
        changes.append(f"--tensor-parallel-size {base.tensor_parallel} -> {launch.tensor_parallel}")
    return tuple(changes)


def _set(name: str, value: str) -> str:
    return f"{name}=..." if SECRET.fullmatch(name) else f"{name}={value}"


def _added_args(base: tuple[str, ...], args: tuple[str, ...]) -> tuple[str, ...]:
    return args[len(base) :] if args[: len(base)] == base else args


def _shown(utilisation: float | None) -> str:
    return "default" if utilisation is None else f"{utilisation:g}"


def with_changes(
    launch: Launch,
    *,
    env: Mapping[str, str] | None = None,
    args: tuple[str, ...] = (),
    utilisation: float | None = None,
    tensor_parallel: int | None = None,
    gpus: tuple[str, ...] | None = None,
) -> Launch:
    """The launch with changes laid over it; None and what is empty leave a setting alone."""
    return replace(
        launch,
        env={**launch.env, **(env or {})},
        args=launch.args if _contains(launch.args, args) else (*launch.args, *args),
        utilisation=launch.utilisation if utilisation is None else utilisation,
        tensor_parallel=launch.tensor_parallel if tensor_parallel is None else tensor_parallel,
        gpus=launch.gpus if gpus is None else gpus,
    )


def _contains(args: tuple[str, ...], part: tuple[str, ...]) -> bool:
    """Whether `part` stands in `args` as it is, so that a flag the admin has set already is not given twice."""
    return any(args[start : start + len(part)] == part for start in range(len(args) - len(part) + 1))
