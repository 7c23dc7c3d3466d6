"""Why a command line cannot run, found before the engine is spawned: a shell's word for it would be poorer."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

#: Another try may succeed when memory, processes, file descriptors or room for the sockets' folder are free again.
PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ETXTBSY,
        errno.EINTR,
    }
)
TOO_LONG = "its command line and environment together are too long"


def problem(argv: tuple[str, ...], env: Mapping[str, str], cwd: Path | None) -> str:
    """A whole sentence, or "" when nothing speaks against running it."""
    name = argv[0]
    if cwd is not None and not cwd.is_dir():
        return f"cannot start the engine: its working directory '{cwd}' does not exist"
    path = Path(cwd or ".", name) if "/" in name else _on_path(name, env)
    if path is None:
        return (
            f"cannot start the engine: no '{name}' in PATH ({env.get('PATH', 'which is not set')}); give its whole path"
        )
    if not path.exists():
        return f"cannot start the engine: '{name}' does not exist"
    if path.is_dir() or not os.access(path, os.X_OK):
        return f"cannot start the engine: '{name}' may not be executed by this user"
    return _format_problem(path)


def spawn_problem(error: OSError | ValueError) -> tuple[str, bool]:
    """What to tell of a spawn that failed, and whether another try is hopeless."""
    if not isinstance(error, OSError):  # a NUL character in an argument or in the environment
        return f"cannot start the engine: {error}", True
    why = TOO_LONG if error.errno == errno.E2BIG else error.strerror or str(error)
    if error.filename is not None:
        why = f"'{error.filename}': {why}"
    return f"cannot start the engine: {why}", error.errno not in PASSING


def _on_path(name: str, env: Mapping[str, str]) -> Path | None:
    found = shutil.which(name, path=env.get("PATH", os.defpath))
    return None if found is None else Path(found)


def _format_problem(path: Path) -> str:
    """A script whose interpreter is gone (an environment that was moved), or a file that is no program at all."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return ""  # may be executed, but not read: the kernel will say
    if start.startswith(b"#!"):
        words = start[2:].partition(b"\n")[0].split()
        interpreter = words[0].decode("utf-8", "replace") if words else ""
        if not Path(interpreter).exists():
            return (
                f"cannot start the engine: '{path}' wants the interpreter '{interpreter}', which does not exist; "
                "was its environment moved? reinstall it, or name its python in the command"
            )
        return ""
    if not start.startswith(b"\x7fELF"):
        return f"cannot start the engine: '{path}' is neither a program nor a script with a '#!' line"
    return ""
