"""Reading vLLM's own command line where the daemon must follow what it says.

As vLLM's parser does (utils/argparse_utils.py, 0.8.4 to 0.33.0): underscores in a long option's name count as dashes,
"--x=v" is "--x v", and of an option given twice the last one holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
CONFIG_FILE: Final[Option] = ("--config",)
HEADLESS: Final[Option] = ("--headless",)
GRPC: Final[Option] = ("--grpc",)
#: With any of these, ranks may live on other hosts, and this host's GPUs say nothing about how many there are.
SEVERAL_HOSTS: Final[tuple[Option, ...]] = (
    ("--nnodes", "-n"),
    ("--data-parallel-size-local", "-dpl"),
    ("--data-parallel-address", "-dpa"),
    ("--data-parallel-rank", "-dpr"),
    ("--data-parallel-backend", "-dpb"),
    ("--distributed-executor-backend",),
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


def options_in_yaml(text: str) -> frozenset[str]:
    """The long options ("--port") that a file for vLLM's --config sets: the keys at the margin of its YAML."""
    keys = re.findall(r"""^["']?([A-Za-z][\w-]*)["']?\s*:""", text, re.MULTILINE | re.ASCII)
    return frozenset(f"--{key.replace('_', '-')}" for key in keys)


def _name(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name
