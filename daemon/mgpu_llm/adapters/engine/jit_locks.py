"""Lock files that a killed compile leaves, for which every later start waits for ever.

torch.utils.cpp_extension guards a build by a file "lock" that it makes with O_EXCL and removes afterwards (file_baton.py,
FileBaton, torch 2.13.0): whoever finds it waits until it is gone. Its maker keeps it open until then, so that one which no
process has open is nobody's. Locks taken with fcntl or flock (filelock, as flashinfer and vLLM use it) die with their holder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine import leftovers
from mgpu_llm.adapters.engine.tree import PROC, all_pids, read_proc

NAME: Final = "lock"
#: cached_ops of flashinfer are the deepest: version, architecture, cached_ops, name, lock.
DEEPEST: Final = 6
MOST_ENTRIES: Final = 20_000
#: File systems that no other host writes to, on which it might compile.
LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay"})


@dataclass(frozen=True, kw_only=True)
class _Lock:
    path: Path
    device: int
    inode: int


def caches(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Where an engine in this environment builds extensions: torch (cpp_extension.py, _get_build_directory, 2.13.0) and
    flashinfer (jit/env.py), which builds by torch up to 0.2."""
    home = Path(environment.get("HOME") or "/")
    torch = environment.get("TORCH_EXTENSIONS_DIR")
    user = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    flashinfer = Path(environment.get("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer"
    found = (Path(torch) if torch else user / "torch_extensions", flashinfer)
    return tuple(path for path in found if path.is_absolute())


def remove_stale(folders: tuple[Path, ...]) -> tuple[str, ...]:
    """Remove the locks of our user in these folders that nobody holds; to be called while no engine of ours runs. Returns a
    sentence for each, and for those that stay because somebody may hold them unseen. May wait on a disk."""
    told, found = [], [lock for folder in folders for lock in _locks(folder)]
    held = _open_somewhere(found) if found else frozenset()
    for lock in found:
        if lock in held:
            continue
        if why := _doubt(lock.path):
            told.append(f"left '{lock.path}', for which the engine may wait for ever: {why}")
        elif _remove(lock):
            told.append(
                f"removed '{lock.path}': a compile that was killed left it, and every later one would wait for it"
            )
    return tuple(told)


def _locks(folder: Path) -> Iterator[_Lock]:
    todo, seen = [(str(folder), 1)], 0
    for path, depth in todo:
        try:
            entries = list(os.scandir(path))
        except OSError:
            continue
        for entry in entries:
            seen += 1
            if seen > MOST_ENTRIES:
                return
            try:
                if entry.is_dir(follow_symlinks=False):
                    if depth < DEEPEST:
                        todo.append((entry.path, depth + 1))
                elif entry.name == NAME:
                    info = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode) and info.st_size == 0 and info.st_uid == os.geteuid():
                        yield _Lock(path=Path(entry.path), device=info.st_dev, inode=info.st_ino)
            except OSError:
                continue


def _open_somewhere(locks: list[_Lock]) -> frozenset[_Lock]:
    """Those that a process has open; all of them where a process of our user may not be looked at."""
    by_inode = {(lock.device, lock.inode): lock for lock in locks}
    held = set[_Lock]()
    for pid in all_pids():
        folder = PROC / str(pid) / "fd"
        try:
            for descriptor in os.scandir(folder):
                try:
                    if os.path.basename(os.readlink(descriptor.path)) == NAME:  # noqa: PTH115, PTH119 - thousands of them
                        info = os.stat(descriptor.path)  # noqa: PTH116
                        held |= {by_inode[key]} if (key := (info.st_dev, info.st_ino)) in by_inode else set()
                except OSError:
                    continue
        except PermissionError:
            if _is_ours(pid):
                return frozenset(locks)
        except OSError:
            continue
    return frozenset(held)


def _is_ours(pid: int) -> bool:
    """By its status: its folder belongs to root where it may not be dumped."""
    lines = read_proc(f"{pid}/status").split(b"\n")
    return any(line.startswith(b"Uid:") and str(os.geteuid()).encode() in line.split()[1:] for line in lines)


def _doubt(path: Path) -> str:
    """Why somebody whom we cannot see may hold it, "" where nobody can."""
    if not leftovers.all_pids_are_visible():
        return "processes of other containers, which may use it, cannot be seen here; remove it if nothing compiles"
    kind = _file_system(path)
    if kind not in LOCAL:
        return f"it is on a file system ({kind or 'unknown'}) that other hosts may use; remove it if nothing compiles"
    return ""


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on, as the kernel names it."""
    real, longest, kind = str(path.resolve()), "", ""
    for line in (PROC / "self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4]
        if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(longest):
            longest, kind = mount, after.split()[0]
    return kind


def _remove(lock: _Lock) -> bool:
    try:
        now = lock.path.lstat()
        if (now.st_dev, now.st_ino) != (lock.device, lock.inode):
            return False
        lock.path.unlink()
    except OSError:
        return False
    return True
