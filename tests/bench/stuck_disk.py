"""A read-only file system over FUSE that shows one flat folder and stops answering in the middle: a network disk that is lost.

    python -m tests.bench.stuck_disk FOLDER MOUNTPOINT --after BYTES

Serves until it is killed, or until somebody who waits for it is; whoever waits then gets an error. (By itself the kernel lets
no asker die, even of SIGKILL, before its request is finished: "wait it out", says fs/fuse/dev.c.) Speaks the kernel's protocol
(linux/fuse.h, 7.31) by itself: no library is needed, only root and /dev/fuse.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from typing import Final

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = (
    1, 2, 3, 14, 15, 18, 25, 26, 27, 28, 29, 36, 38, 42,
)  # fmt: skip
ROOT: Final = 1
HEADER: Final = struct.Struct("<IIQQIIII")
ATTR: Final = struct.Struct("<QQQQQQIIIIIIIIII")
MOST_BYTES: Final = 1 << 20
VALID_S: Final = 3600


class StuckDisk:
    """`folder` as files of node 2, 3, ...; after `after` bytes of data no read is ever answered again."""

    def __init__(self, folder: Path, after: int, device: int) -> None:
        self._files = sorted(path for path in folder.iterdir() if path.is_file())
        self._after = after
        self._device = device

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, MOST_BYTES + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # the asker was killed meanwhile
                    continue
                raise
            _, opcode, unique, node, *_ = HEADER.unpack_from(request)
            if opcode == INTERRUPT:
                return
            self._answer(opcode, unique, node, request[HEADER.size :])

    def _answer(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        if opcode in (FORGET, BATCH_FORGET):
            return
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            if self._after <= 0:
                return
            self._after -= size
            with self._files[node - 2].open("rb") as file:
                self._reply(unique, os.pread(file.fileno(), size, offset))
        elif opcode == INIT:
            major_minor_readahead = struct.pack("<III", 7, 31, 1 << 20)
            self._reply(unique, major_minor_readahead + struct.pack("<IHHIIHH28x", 0, 64, 48, MOST_BYTES, 1, 256, 0))
        elif opcode == LOOKUP:
            name = body.rstrip(b"\0").decode()
            found = [number for number, path in enumerate(self._files, 2) if path.name == name]
            if found:
                self._reply(unique, struct.pack("<QQQQII", found[0], 0, VALID_S, VALID_S, 0, 0) + self._attr(found[0]))
            else:
                self._reply(unique, b"", errno.ENOENT)
        elif opcode == GETATTR:
            self._reply(unique, struct.pack("<QII", VALID_S, 0, 0) + self._attr(node))
        elif opcode in (OPEN, OPENDIR):
            self._reply(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode == READDIR:
            _, offset, size = struct.unpack_from("<QQI", body)
            self._reply(unique, self._listing(offset, size))
        elif opcode in (RELEASE, RELEASEDIR, FLUSH, DESTROY):
            self._reply(unique, b"")
        else:
            self._reply(unique, b"", errno.ENOSYS)

    def _listing(self, offset: int, size: int) -> bytes:
        listing = b""
        for number, path in enumerate(self._files[offset:], offset):
            name = path.name.encode()
            entry = struct.pack("<QQII", number + 2, number + 1, len(name), stat.S_IFREG >> 12) + name
            entry += b"\0" * (-len(entry) % 8)
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing

    def _attr(self, node: int) -> bytes:
        size = 0 if node == ROOT else self._files[node - 2].stat().st_size
        mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o444
        return ATTR.pack(node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _reply(self, unique: int, body: bytes, error: int = 0) -> None:
        try:
            os.write(self._device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
        except OSError as gone:
            if gone.errno != errno.ENOENT:  # the asker was killed meanwhile
                raise


def mount(mountpoint: Path) -> int:
    """Mount a FUSE file system there; returns the device through which it is to be served. Raises OSError."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"stuck-disk", str(mountpoint).encode(), b"fuse", ctypes.c_ulong(1), options) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a folder on a disk that stops answering.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--after", type=int, required=True, help="bytes of data that are still answered")
    given = parser.parse_args()
    StuckDisk(given.folder, given.after, mount(given.mountpoint)).serve()


if __name__ == "__main__":
    main()
