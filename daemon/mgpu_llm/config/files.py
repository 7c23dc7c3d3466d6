"""Reading the config's files: the main one, then the drop-ins beside it in the order of their names. Those of the instance NAME,
/etc/mgpu-llm/NAME.toml, are NAME.d/*.toml, all others' are conf.d/*.toml: what is meant for one model does not change another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.config.problem import ConfigProblem
from mgpu_llm.core import instances

DEFAULT_PATH: Final = Path(instances.config_file(""))
DROP_IN_FOLDER: Final = "conf.d"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The text of one file."""

    file: Path
    text: str


def read(main: Path) -> tuple[tuple[Source, ...], tuple[ConfigProblem, ...]]:
    """The files that could be read, later ones weighing more, and what was wrong with the others."""
    sources, problems = list[Source](), list[ConfigProblem]()
    name = instance(main)
    folder = main.parent / (f"{name}.d" if name else DROP_IN_FOLDER)
    try:
        files = [main, *_drop_ins(folder)]
    except OSError as error:
        files = [main]
        problems.append(_unreadable(folder, _reason(error)))
    for file in files:
        try:
            # Editors of other systems put a byte order mark first, which TOML's grammar does not know.
            sources.append(Source(file=file, text=file.read_bytes().decode("utf-8-sig")))
        except FileNotFoundError as error:
            hint = "copy etc/mgpu-llm.toml there" if file == main else "remove the dangling link"
            problems.append(_unreadable(file, _reason(error), hint))
        except OSError as error:
            problems.append(_unreadable(file, _reason(error)))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            why = f"byte 0x{error.object[error.start]:02x} in line {line} is not UTF-8"
            problems.append(_unreadable(file, why, "save it as UTF-8"))
    return tuple(sources), tuple(problems)


def defaults(main: Path) -> tuple[Source, ...]:
    """What an instance's folders are unless its files say otherwise, to be laid under these; nothing for the usual one."""
    name = instance(main)
    if not name:
        return ()
    folders = f'runtime_dir = "{instances.runtime_dir(name)}"\nstate_dir = "{instances.state_dir(name)}"'
    return (Source(file=main, text=f"[daemon]\n{folders}"),)


def instance(main: Path) -> str:
    """Whose config that is, "" for the usual one's, however its path is written; links are left as they are."""
    return instances.of_config(Path(os.path.normpath(main.absolute())))


def _drop_ins(folder: Path) -> list[Path]:
    """Hidden files are left out: editors keep their locks and copies in those."""
    try:
        files = list(folder.iterdir())
    except FileNotFoundError:
        return []
    return sorted(file for file in files if file.suffix == ".toml" and not file.name.startswith("."))


def _unreadable(file: Path, why: str, hint: str = "") -> ConfigProblem:
    return ConfigProblem(file=file, key="", found=f"cannot read it: {why}", hint=hint)


def _reason(error: OSError) -> str:
    """What the system says, in our words where these are clearer."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "it is a folder"
        case PermissionError():
            return "permission denied"
        case _:
            return error.strerror or str(error)
