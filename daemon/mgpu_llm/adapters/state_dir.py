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

#: flock(2) where a file system has none, for folders.
_NO_LOCKS: Final = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})

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
                reason=f"cannot use '{folder}': {_why(error)}; set daemon.state_dir",
                consequence="loads are not recorded, and nothing is learnt from them",
            )
        yield found


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
