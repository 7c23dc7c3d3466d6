"""The folder of what the daemon remembers from one life to the next.

To be wired so, around everything that reads or writes in it:

    with state_dir.held(Path(config.daemon.state_dir)) as folder:      Path, or None: do without
        recorder = Recorder(folder and folder / "records", ...)
        chronicle = Chronicle(recorder, History(folder), KnownGoodRung(folder), ...)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from mgpu_llm.core import instances, sandbox

#: flock(2) where a file system has none, for folders.
_NO_LOCKS: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
#: Of a folder that cannot be used.
CONSEQUENCE: Final = "loads are not recorded, nothing is learnt from them, and the next start begins at the base"

log = structlog.get_logger()


@contextmanager
def held(folder: Path) -> Iterator[Path | None]:
    """The folder, made if need be and ours alone while this is entered; None, with one warning, where it cannot be used:
    a daemon that cannot remember can still serve. The lock is the folder's own and dies with its holder."""
    with contextlib.ExitStack() as stack:
        found: Path | None = None
        try:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            _lock(descriptor)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"0")
            found = folder
        except OSError as error:
            log.warning(
                "state.unusable",
                reason=f"cannot use '{folder}': {_why(error)}; set daemon.state_dir{sandboxed(error, folder)}",
                consequence=CONSEQUENCE,
            )
        yield found


def foreseen(folder: Path) -> str:
    """What `held` would find of the folder for this user, in one line; "" where it is there and can be used. Makes nothing, and
    so does not see what only a trial shows: a full disk, another mgpud."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    there = nearest == folder
    if not os.path.isdir(nearest):  # noqa: PTH112 - is_dir raises where a link leads to what is hidden
        why = "it is not a folder" if there else f"'{nearest}' is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK | (os.R_OK if there else 0), effective_ids=True):
        user = f"this user (uid {os.geteuid()})"
        why = f"{user} may not write in it" if there else f"{user} may not make it in '{nearest}'"
    else:
        return "" if there else f"'{folder}' is not there yet: it will be made"
    return f"cannot use '{folder}': {why}; set daemon.state_dir, else {CONSEQUENCE}"


def sandboxed(error: OSError, folder: Path) -> str:
    """What else would help where it is the unit's sandbox that makes a folder read-only, after what helps anyhow; else ""."""
    if error.errno != errno.EROFS or "INVOCATION_ID" not in os.environ:
        return ""
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        groups = ""
    cure = sandbox.opened(sandbox.unit_of(groups) or instances.unit(""), str(folder))
    return f", or, where its unit makes that read-only (the folder must be there): {cure}"


def _why(error: OSError) -> str:
    if isinstance(error, BlockingIOError):
        return "another mgpud uses it"
    return "it is not a folder" if isinstance(error, FileExistsError) else (error.strerror or str(error)).lower()


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
