"""Files that a killed engine leaves behind, removed only when they are certainly its own.

SIGKILL leaves shared memory of up to 251 MB a piece in /dev/shm (vLLM 0.32.0, measured), and sockets and rendezvous files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mgpu_llm.adapters.engine import tags
from mgpu_llm.adapters.engine.tree import PROC, all_pids

SHM = Path("/dev/shm")  # noqa: S108 (the place itself is meant)
#: Python's shared memory and semaphores, NCCL, CUDA, torch, vLLM.
NAMES = ("psm_*", "nccl-*", "sem.*", "cuda.shm.*", "torch_*", "vllm*", "VLLM*", "mp-*")
#: A socket's path has room for 107 bytes; vLLM appends "/" and a UUID of 36 (network_utils.get_open_zmq_ipc_path).
SOCKET_DIR_BYTES = 107 - 1 - 36
#: vLLM 0.33 names its rendezvous file in a log line: distributed_init_method=file:///tmp/vllm_dist_<hex>.
RENDEZVOUS = re.compile(r"=file://(/\S*/vllm_dist_[0-9a-f]{32})\b")
#: The inodes of the first namespaces (include/linux/proc_ns.h).
FIRST_PID_NAMESPACE = "pid:[4026531836]"
FIRST_IPC_NAMESPACE = "ipc:[4026531839]"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file in shared memory, as /proc/PID/maps names it: device "00:1b", inode."""

    name: str
    device: str
    inode: int


class SharedMemory:
    """What one attempt adds to /dev/shm, from its making (before the spawn) to `remove` (when all processes are gone)."""

    def __init__(self) -> None:
        self._before = shared_files()
        self._proven: frozenset[File] = frozenset()

    def see_holders(self, pids: Iterable[int]) -> bool:
        """What the engine's own processes hold is theirs, whatever its name. May wait on a stuck process."""
        self._proven |= held(shared_files() - self._before, pids)
        return True

    def remove(self) -> tuple[str, ...]:
        """Removes what is new, ours and in nobody's use; returns remarks. May wait on a stuck process."""
        new = shared_files() - self._before
        return remove_unheld((new & self._proven) | (likely(new) if everyone_is_visible() else frozenset()))


def likely(files: Iterable[File]) -> frozenset[File]:
    """Those with the names that engines give."""
    return frozenset(file for file in files if any(fnmatchcase(file.name, pattern) for pattern in NAMES))


def remove_unheld(files: frozenset[File]) -> tuple[str, ...]:
    """Removes those that no process uses; returns remarks. May wait on a stuck process."""
    remarks = []
    for file in sorted(files - held(files, all_pids()), key=lambda file: file.name):
        try:
            (SHM / file.name).unlink(missing_ok=True)
        except OSError as error:
            remarks.append(f"cannot remove '{SHM / file.name}': {error.strerror}")
    return tuple(remarks)


def shared_files() -> frozenset[File]:
    """Regular files of our user in /dev/shm."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(SHM) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                stat = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False) and stat.st_uid == os.getuid():
                    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
                    found.add(File(name=entry.name, device=device, inode=stat.st_ino))
    return frozenset(found)


def everyone_is_visible() -> bool:
    """Whether /proc shows everybody who may use our /dev/shm: not so in a container that shares only the IPC namespace."""
    return all_pids_are_visible() or str((PROC / "self/ns/ipc").readlink()) != FIRST_IPC_NAMESPACE


def all_pids_are_visible() -> bool:
    """Whether we are in the first pid namespace, and every process of the host has a pid that we know."""
    return str((PROC / "self/ns/pid").readlink()) == FIRST_PID_NAMESPACE


def held(files: Iterable[File], pids: Iterable[int]) -> frozenset[File]:
    """Those that a process has mapped or open. Processes that may not be looked at are passed over."""
    by_inode = {(file.device, str(file.inode)): file for file in files}
    by_name = {file.name: file for file in files}
    found: set[File] = set()
    for pid in pids if by_inode else ():
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
                if line.endswith(" "):  # anonymous memory, the most of it
                    continue
                _, _, _, device, inode, *_ = line.split(maxsplit=5)
                if (device, inode) in by_inode:
                    found.add(by_inode[device, inode])
        with contextlib.suppress(OSError):
            for fd in (PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    name = fd.readlink().name
                    if name in by_name:
                        found.add(by_name[name])
    return frozenset(found)


def make_socket_folder(runtime_dir: Path) -> Path:
    """A fresh private folder for an attempt's sockets: in `runtime_dir` if their paths then still fit, else in /tmp."""
    inside, in_tmp = _socket_folders(runtime_dir)
    fits = len(bytes(inside)) + 8 <= SOCKET_DIR_BYTES and runtime_dir.is_dir()
    place = inside if fits else in_tmp
    return Path(tempfile.mkdtemp(prefix=place.name, dir=place.parent))


def remove_socket_folders(runtime_dir: Path) -> None:
    """All of them, when no engine is left."""
    for place in _socket_folders(runtime_dir):
        for folder in place.parent.glob(place.name + "*"):
            if folder.lstat().st_uid == os.getuid():
                remove_folder(folder)


def _socket_folders(runtime_dir: Path) -> tuple[Path, Path]:
    """How their paths begin. The name in /tmp tells the daemons apart."""
    owner = tags.prefix(runtime_dir).rstrip(":")
    return runtime_dir / "zmq-", Path("/tmp", f"mgpu-llm-{owner}-")  # noqa: S108


def remove_folder(folder: Path) -> tuple[str, ...]:
    shutil.rmtree(folder, ignore_errors=True)
    return (f"cannot remove '{folder}'",) if folder.exists() else ()


def remove_rendezvous(files: Iterable[str]) -> None:
    """Files that the engine itself named in its log."""
    for file in files:
        path = Path(file)
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                path.unlink()
