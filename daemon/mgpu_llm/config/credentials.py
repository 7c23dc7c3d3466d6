"""Secrets that systemd hands over (LoadCredential=, systemd.exec(5)): each file env.NAME of $CREDENTIALS_DIRECTORY is the
variable NAME of [engine.env], over whatever the config's files say. They go into the engine's environment, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mgpu_llm.config.files import Source
from mgpu_llm.config.problem import ConfigProblem, toml
from mgpu_llm.core.redaction import is_secret

FOLDER: Final = "CREDENTIALS_DIRECTORY"
PREFIX: Final = "env."
#: systemd allows a megabyte; a token has some hundred bytes.
LONGEST: Final = 1 << 16


def read(environ: Mapping[str, str]) -> tuple[tuple[Source, ...], tuple[ConfigProblem, ...]]:
    """What was handed over, in the order of the names, and what is wrong with the rest. Other credentials are left alone."""
    sources, problems = list[Source](), list[ConfigProblem]()
    folder = Path(environ.get(FOLDER) or "/nowhere")
    for file in sorted(folder.glob(f"{PREFIX}*")):
        told = _variable(file)
        if isinstance(told, ConfigProblem):
            problems.append(told)
        else:
            sources.append(told)
    return tuple(sources), tuple(problems)


def _variable(file: Path) -> Source | ConfigProblem:
    name = file.name.removeprefix(PREFIX)
    if not is_secret(name):
        # What is no secret by its name would be shown in plans and incidents.
        hint = "write it into [engine.env]"
        return ConfigProblem(
            file=file,
            key="",
            found=f"a credential for the variable {name!r}, which is no secret by its name",
            hint=hint,
        )
    try:
        value = file.read_bytes()[:LONGEST].decode().removesuffix("\n")
    except OSError as error:
        return ConfigProblem(file=file, key="", found=f"cannot read it: {(error.strerror or '').lower()}")
    except UnicodeDecodeError:
        return ConfigProblem(file=file, key="", found="it is not UTF-8", hint="variables are text")
    return Source(file=file, text=f"[engine.env]\n{name} = {toml(value)}\n")
