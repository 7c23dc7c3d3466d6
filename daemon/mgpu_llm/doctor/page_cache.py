"""How much of a file is in the page cache, without reading it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

#: cachestat(2), since Linux 6.5, has this number on every architecture.
CACHESTAT: Final = 451
_MAP_SHARED: Final = 1
_FAILED: Final = ctypes.c_void_p(-1).value


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


def resident_bytes(file: Path) -> int | None:
    """None where the kernel does not tell. Raises nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not status.st_size:
            return 0
        pages = _by_cachestat(libc, descriptor)
        # mincore calls everything resident for one who neither owns the file nor may write it (since Linux 5.2).
        trusted = status.st_uid == os.geteuid() or os.geteuid() == 0 or os.access(file, os.W_OK)
        if pages is None and trusted:
            pages = _by_mincore(libc, descriptor, status.st_size)
        return None if pages is None else min(pages * mmap.PAGESIZE, status.st_size)
    finally:
        os.close(descriptor)


def _by_cachestat(libc: ctypes.CDLL, descriptor: int) -> int | None:
    whole, told = _Range(0, 0), _Stat()
    if libc.syscall(CACHESTAT, descriptor, ctypes.byref(whole), ctypes.byref(told), 0) != 0:
        return None
    return int(told.cache)


def _by_mincore(libc: ctypes.CDLL, descriptor: int, size: int) -> int | None:
    """The pages are mapped and never touched, so none of them is read."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    address = libc.mmap(None, size, mmap.PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        return None
    try:
        states = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) != 0:
            return None
        return sum(state & 1 for state in bytes(states))
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
