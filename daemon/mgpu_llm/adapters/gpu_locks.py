"""Locks on GPUs that every instance of a host meets, and that die with their holder, however it dies.

One file a GPU, named by its UUID, in each of several folders. What counts is flock(2) on the file; what is written in it only
names the holder. Who was killed leaves its files: one that nobody has locked is no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

#: The kernel's list of locks, with the pid of each holder in our pid namespace.
PROC_LOCKS: Final = Path("/proc/locks")
#: Whoever makes a file makes it accessible to all a moment later.
OPEN_TRIES: Final = 10
OPEN_PAUSE_S: Final = 0.02
LONGEST_FILE: Final = 65536
LONGEST_TEXT: Final = 200


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One instance, as it describes itself; "" is what nobody tells."""

    pid: int
    user: str = ""
    config: str = ""
    runtime_dir: str = ""
    shared: bool = False

    def __str__(self) -> str:
        told = [f"pid {self.pid}"] if self.pid else []
        told += [f"user {self.user}"] if self.user else []
        told += [f"config '{self.config}'"] if self.config else []
        told += [f"runtime folder '{self.runtime_dir}'"] if self.runtime_dir else []
        return ", ".join(told) or "nobody can tell which"


class HeldError(Exception):
    """Others hold the GPU `uuid`, and they or we do not share."""

    def __init__(self, uuid: str, holders: tuple[Holder, ...]) -> None:
        super().__init__(uuid)
        self.uuid = uuid
        self.holders = holders


class SpoiltError(Exception):
    """What stands where the lock on GPU `uuid` belongs is none: `why` in one line."""

    def __init__(self, uuid: str, why: str) -> None:
        super().__init__(why)
        self.uuid = uuid
        self.why = why


@contextmanager
def held(
    folders: Sequence[Path], uuids: Iterable[str], me: Holder, partly: Collection[str] = ()
) -> Iterator[dict[str, str]]:
    """Hold all these GPUs in every folder that can be used, or none. Yields the folders that cannot, each with why.

    `partly` are GPUs of which we have a slice: they are held against those who want them whole, and nobody else. Always in the
    same order: of several who start at once with the same GPUs, one gets them all. Raises HeldError and SpoiltError.
    """
    wanted = sorted({*uuids, *partly})
    with ExitStack() as stack:
        unusable = dict[str, str]()
        for folder in sorted(set(folders)):
            for uuid in wanted:
                try:
                    descriptor = _acquire(folder, uuid, me, shared=me.shared or uuid in partly)
                except OSError as error:
                    unusable[str(folder)] = (error.strerror or str(error)).lower()
                    break
                stack.callback(_release, descriptor, path_of(folder, uuid))
        yield unusable


def holders(folders: Iterable[Path], uuid: str) -> tuple[Holder, ...]:
    """Who holds a GPU now. Takes no lock for it, not even for a moment: that could be the moment in which somebody starts."""
    found = dict[int, Holder]()
    for folder in folders:
        with suppress(OSError):
            descriptor = os.open(path_of(folder, uuid), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found |= {holder.pid: holder for holder in _holders(descriptor) if _kernel_pids(descriptor)}
            finally:
                os.close(descriptor)
    return tuple(found.values())


def path_of(folder: Path, uuid: str) -> Path:
    return folder / f"mgpu-llm-{re.sub(r'[^A-Za-z0-9-]', '_', uuid)}.lock"


def _acquire(folder: Path, uuid: str, me: Holder, *, shared: bool) -> int:
    """The lock file, open and locked. Raises HeldError, SpoiltError, and OSError where the folder cannot be used."""
    path = path_of(folder, uuid)
    for _ in range(OPEN_TRIES):
        descriptor = _open(folder, uuid)
        try:
            _take(descriptor, uuid, shared=shared)
            if _is_at(path, descriptor):
                _write(descriptor, me, shared=shared)
                return descriptor
        except (HeldError, SpoiltError):
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has just removed it
    raise SpoiltError(uuid, f"'{path}' comes and goes; see who removes it")


def _release(descriptor: int, path: Path) -> None:
    """Let go of it, and remove the file unless others share it: who has opened it meanwhile sees that it is gone."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, ours = path.lstat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _open(folder: Path, uuid: str) -> int:
    """The lock file, made if need be, for every user whatever our umask. Raises OSError where the folder cannot be used."""
    path = path_of(folder, uuid)
    for attempt in range(OPEN_TRIES):
        try:
            descriptor = _open_existing(path)
        except FileNotFoundError:
            with suppress(FileExistsError):
                # Not without O_EXCL: fs.protected_regular forbids O_CREAT of another's file in a folder such as /run/lock.
                made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                os.fchmod(made, 0o666)
                return made
        except PermissionError:
            if not os.access(folder, os.X_OK, effective_ids=True):
                raise
            if attempt == OPEN_TRIES - 1:
                raise SpoiltError(uuid, f"this user may not open '{path}'; remove it") from None
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise SpoiltError(uuid, f"'{path}' is no lock file ({(error.strerror or '').lower()}); remove it") from None
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
            raise SpoiltError(uuid, f"'{path}' is no lock file (not a regular file); remove it")
        time.sleep(OPEN_PAUSE_S)
    raise SpoiltError(uuid, f"'{path}' comes and goes; see who removes it")


def _open_existing(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if not isinstance(error, PermissionError) and "read-only" not in (error.strerror or "").lower():
            raise
    # Enough for a lock; only our name cannot be written into it.
    return os.open(path, os.O_RDONLY | flags)


def _take(descriptor: int, uuid: str, *, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeldError(uuid, _holders(descriptor) or (Holder(pid=0),)) from None
    except OSError as error:  # a file system without locks
        raise SpoiltError(uuid, f"cannot lock: {(error.strerror or str(error)).lower()}; set gpus.lock_dirs") from None


def _write(descriptor: int, me: Holder, *, shared: bool) -> None:
    """Our name, after those of others who share it: they may write theirs at this moment. Of a pid the last word counts."""
    with suppress(OSError):  # opened for reading only, or a full disk: the lock holds all the same
        if not shared or os.fstat(descriptor).st_size > LONGEST_FILE // 2:
            os.ftruncate(descriptor, 0)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        os.write(descriptor, f"{json.dumps(asdict(me))}\n".encode())


def _holders(descriptor: int) -> tuple[Holder, ...]:
    """Who has locked the file, as the kernel says, in the words of the file; in those alone where the holder is in another
    container, whose pids mean nothing here."""
    written = {holder.pid: holder for holder in _written(descriptor)}
    pids = _kernel_pids(descriptor)
    if not pids:
        return tuple(written.values())
    return tuple(written.get(pid, Holder(pid=pid)) for pid in pids)


def _kernel_pids(descriptor: int) -> tuple[int, ...]:
    info = os.fstat(descriptor)
    place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        lines = [line.split() for line in PROC_LOCKS.read_text().splitlines()]
    except OSError:
        return ()
    return tuple(sorted({int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == place}))


def _written(descriptor: int) -> Iterator[Holder]:
    """What the file says, as far as it is ours: anybody may write into it."""
    for line in os.pread(descriptor, LONGEST_FILE, 0).decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("pid")) is int:
                texts = {name: _text(row.get(name)) for name in ("user", "config", "runtime_dir")}
                yield Holder(pid=row["pid"], shared=row.get("shared") is True, **texts)


def _text(found: object) -> str:
    return found[:LONGEST_TEXT] if isinstance(found, str) and found.isprintable() else ""
