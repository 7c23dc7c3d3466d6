"""Reading vLLM's own command line where the daemon must follow what it says.

As vLLM's parser does (utils/argparse_utils.py, 0.8.4 to 0.33.0): underscores in a long option's name count as dashes,
"--x=v" is "--x v", and of an option given twice the last one holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

Option = tuple[str, ...]

HOST: Final[Option] = ("--host",)
PORT: Final[Option] = ("--port",)
SOCKET: Final[Option] = ("--uds",)
CERTIFICATE: Final[Option] = ("--ssl-certfile",)
CERTIFICATE_KEY: Final[Option] = ("--ssl-keyfile",)
CLIENT_CERTIFICATES: Final[Option] = ("--ssl-cert-reqs",)
API_KEY: Final[Option] = ("--api-key",)
SERVED_NAME: Final[Option] = ("--served-model-name",)
MODEL: Final[Option] = ("--model",)
TENSOR_PARALLEL: Final[Option] = ("--tensor-parallel-size", "-tp")
PIPELINE_PARALLEL: Final[Option] = ("--pipeline-parallel-size", "-pp")
PREFILL_CONTEXT_PARALLEL: Final[Option] = ("--prefill-context-parallel-size", "-pcp")
DATA_PARALLEL: Final[Option] = ("--data-parallel-size", "-dp")
UTILISATION: Final[Option] = ("--gpu-memory-utilization",)
DEVICES: Final[Option] = ("--device-ids",)
LOAD_FORMAT: Final[Option] = ("--load-format",)
CONTEXT: Final[Option] = ("--max-model-len",)
CONFIG_FILE: Final[Option] = ("--config",)
HEADLESS: Final[Option] = ("--headless",)
GRPC: Final[Option] = ("--grpc",)
HOSTS: Final[Option] = ("--nnodes", "-n")
DATA_PARALLEL_BACKEND: Final[Option] = ("--data-parallel-backend", "-dpb")
EXECUTOR: Final[Option] = ("--distributed-executor-backend",)
#: With any of these, ranks may live on other hosts, and this host's GPUs say nothing about how many there are.
SEVERAL_HOSTS: Final[tuple[Option, ...]] = (
    HOSTS,
    ("--data-parallel-size-local", "-dpl"),
    ("--data-parallel-address", "-dpa"),
    ("--data-parallel-rank", "-dpr"),
    DATA_PARALLEL_BACKEND,
    EXECUTOR,
)
#: Unless they say one of these.
_ONE_HOST: Final[Mapping[Option, tuple[str, ...]]] = {
    HOSTS: ("1",),
    DATA_PARALLEL_BACKEND: ("mp",),
    EXECUTOR: ("mp", "uni"),
}
#: The options that multiply the ranks of tensor parallelism, in words.
MULTIPLIERS: Final[Mapping[Option, str]] = {
    PIPELINE_PARALLEL: "pipeline parallelism",
    PREFILL_CONTEXT_PARALLEL: "prefill context parallelism",
    DATA_PARALLEL: "data parallelism",
}
#: With any of these the weights may take another room in GPU memory than their files on the disk.
OTHER_WEIGHTS: Final[tuple[Option, ...]] = (
    ("--quantization", "-q"),
    ("--quantization-config",),
    ("--dtype",),
    ("--hf-overrides",),
    ("--cpu-offload-gb",),
    ("--offload-backend",),
    ("--offload-group-size",),
    ("--offload-params",),
)
#: With any of these config.json does not tell the context length.
OTHER_CONTEXT: Final[tuple[Option, ...]] = (
    CONFIG_FILE,
    ("--hf-config-path",),
    ("--hf-overrides",),
    ("--rope-scaling",),
    ("--disable-sliding-window",),
)
#: Where the API is and who may use it: the same on every rung.
ENDPOINT: Final[tuple[Option, ...]] = (
    HOST,
    PORT,
    SOCKET,
    CERTIFICATE,
    CERTIFICATE_KEY,
    CLIENT_CERTIFICATES,
    API_KEY,
    SERVED_NAME,
)


def values(args: Sequence[str], option: Option) -> tuple[str, ...] | None:
    """All values of an option, () for one that stands alone, None where it is absent."""
    found: tuple[str, ...] | None = None
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if _name(name) not in option:
            continue
        following = args[index + 1 :]
        end = next((at for at, other in enumerate(following) if other.startswith("-")), len(following))
        found = (value,) if equals else tuple(following[:end])
    return found


def value(args: Sequence[str], option: Option) -> str | None:
    """The one value of an option, the first of several, "" for one that stands alone, None where it is absent."""
    found = values(args, option)
    return found if found is None else (*found, "")[0]


def number(args: Sequence[str], option: Option) -> int | None:
    """An option's integer; None where it is absent, or is no integer (vLLM refuses that itself, at once)."""
    found = value(args, option)
    return int(found) if found is not None and re.fullmatch(r"\d{1,9}", found, re.ASCII) else None


def port(args: Sequence[str]) -> int | None:
    """The port of --port, None where that is absent or no port."""
    found = number(args, PORT)
    return found if found is not None and 1 <= found <= 65535 else None


def has(args: Sequence[str], option: Option) -> bool:
    return values(args, option) is not None


def has_any(args: Sequence[str], options: Sequence[Option]) -> bool:
    return any(has(args, option) for option in options)


def one_host(args: Sequence[str]) -> bool:
    """Whether all ranks are on this host for certain."""
    return not any(
        has(args, option) and value(args, option) not in _ONE_HOST.get(option, ()) for option in SEVERAL_HOSTS
    )


def multipliers(args: Sequence[str]) -> dict[Option, int]:
    """What multiplies the ranks of tensor parallelism, and by how many."""
    return {option: times for option in MULTIPLIERS if (times := number(args, option) or 1) > 1}


def tokens(args: Sequence[str]) -> int | None:
    """The number of --max-model-len; None where it is absent, is left to vLLM ("auto", -1) or is none. vLLM takes it with a
    decimal ("8k", "25.6k") or a binary ("8K") unit (utils/argparse_utils.py, human_readable_int, 0.8.4 to 0.32.0)."""
    found = re.fullmatch(r"(\d{1,9})(\.\d{1,9})?([kmgtKMGT]?)", value(args, CONTEXT) or "", re.ASCII)
    if found is None or (found[2] and not found[3].islower()):
        return None
    power = "kmgt".find(found[3].lower()) + 1 if found[3] else 0
    return int(float(found[1] + (found[2] or "")) * (1000 if found[3].islower() else 1024) ** power) or None


def options_in_yaml(text: str) -> frozenset[str]:
    """The long options ("--port") that a file for vLLM's --config sets: the keys at the margin of its YAML."""
    keys = re.findall(r"""^["']?([A-Za-z][\w-]*)["']?\s*:""", text, re.MULTILINE | re.ASCII)
    return frozenset(f"--{key.replace('_', '-')}" for key in keys)


def _name(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name
