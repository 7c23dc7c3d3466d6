"""What a start is surrounded by in the corpus: slow and lost disks, little memory, busy cores, locks of dead builders.

Each is a context manager that yields a Change. All need root, Linux, and cgroup v1 for those that limit (CGROUPS).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.toy_setup import ROOT

CGROUPS: Final = Path("/sys/fs/cgroup")
EMPTY_S: Final = 20.0
MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the surroundings change about the start: the model's folder, its environment, the command before its command,
    and the shell command of the fault `run:` that the scenario may name."""

    model: Path
    env: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    run: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a scenario works: the folder for its files, and the model's own."""

    folder: Path
    model: Path


Surroundings = Callable[[Place], AbstractContextManager[Change]]


@contextlib.contextmanager
def ordinary(place: Place) -> Iterator[Change]:
    yield Change(model=place.model)


@contextlib.contextmanager
def cold_cache(place: Place) -> Iterator[Change]:
    drop_pages(place.model)
    yield Change(model=place.model)


def slow_disk(bytes_per_s: int, stops_after_s: float | None = None) -> Surroundings:
    """The model lies on a disk of its own, out of every cache, that reads at that speed. The change's `run` stops the disk
    after so long."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        with own_disk(place) as (model, device), cgroup("blkio") as group:
            limit = group / "blkio.throttle.read_bps_device"
            limit.write_text(f"{device} {bytes_per_s}")
            stop = f"sleep {stops_after_s}; echo '{device} 1' > {limit}" if stops_after_s is not None else ""
            try:
                yield Change(model=model, before=entering(group), run=stop)
            finally:
                limit.write_text(f"{device} 0")  # what still waits for the disk can end

    return surroundings


@contextlib.contextmanager
def own_disk(place: Place) -> Iterator[tuple[Path, str]]:
    """A copy of the model on a loop device with nothing else on it, and the device's numbers: when the disk of everything
    is slowed down, the engine's imports are what takes long."""
    image, mountpoint = place.folder / "disk.img", place.folder / "disk"
    size = sum(path.stat().st_size for path in place.model.iterdir())
    with image.open("wb") as file:
        file.truncate(size + size // 10 + 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mountpoint.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
    try:
        model = mountpoint / place.model.name
        shutil.copytree(place.model, model)
        os.sync()
        drop_pages(model)
        number = model.stat().st_dev
        yield model, f"{os.major(number)}:{os.minor(number)}"
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)
        mountpoint.rmdir()
        image.unlink()


def little_memory(limit_bytes: int) -> Surroundings:
    """The engine has so much memory, pages of files included, and the model is in no cache."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        drop_pages(place.model)
        with cgroup("memory") as group:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
            try:
                yield Change(model=place.model, before=entering(group))
            finally:
                for name in ("memory.max_usage_in_bytes", "memory.failcnt"):
                    print(f"{name}: {(group / name).read_text().strip()}")

    return surroundings


def busy_cores(loops: int) -> Surroundings:
    """So many processes compute beside the engine, each with the same right to the cores as all of the engine: a session
    of its own makes the scheduler count each for itself (autogroups)."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        with contextlib.ExitStack() as stack:
            for _ in range(loops):
                loop = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True)
                stack.callback(_kill, loop)
            yield Change(model=place.model)

    return surroundings


@contextlib.contextmanager
def pipe_for_a_shard(place: Place) -> Iterator[Change]:
    """The last shard is a named pipe that nobody writes: whoever opens it waits in the kernel."""
    with copied(place) as model:
        shard = _shards(model)[-1]
        shard.unlink()
        os.mkfifo(shard)
        yield Change(model=model)


@contextlib.contextmanager
def cut_shard(place: Place) -> Iterator[Change]:
    """A download was broken off in the middle of the last shard."""
    with copied(place) as model:
        shard = _shards(model)[-1]
        os.truncate(shard, shard.stat().st_size // 2)
        yield Change(model=model)


@contextlib.contextmanager
def missing_shard(place: Place) -> Iterator[Change]:
    with copied(place) as model:
        _shards(model)[-1].unlink()
        yield Change(model=model)


def lost_disk(after_bytes: int) -> Surroundings:
    """The model lies on a file system that stops answering after so many bytes, as a network's does."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        mountpoint = place.folder / "network"
        mountpoint.mkdir()
        command = ["-m", "tests.bench.stuck_disk", str(place.model), str(mountpoint), "--after", str(after_bytes)]
        server = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        try:
            while not mountpoint.is_mount():
                time.sleep(0.05)
            yield Change(model=mountpoint)
        finally:
            _kill(server)  # whoever still waits gets an error
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=False)
            mountpoint.rmdir()

    return surroundings


@contextlib.contextmanager
def stale_baton(place: Place) -> Iterator[Change]:
    """A builder of a torch extension died and left its lock file."""
    folder = place.folder / "torch_extensions"
    folder.mkdir()
    (folder / "lock").touch()
    try:
        yield Change(model=place.model, env={"MGPU_FAULT_BUILD_DIR": str(folder)})
    finally:
        shutil.rmtree(folder)


def held_compile_locks(cache: Path) -> Surroundings:
    """`cache` was filled by an earlier start. Only its lock files are left, and a stopped process holds them all, as a
    compile worker does that never comes back."""

    @contextlib.contextmanager
    def surroundings(place: Place) -> Iterator[Change]:
        locks = sorted(cache.rglob("*.lock"))
        if not locks:
            raise FileNotFoundError(f"no start has compiled into {cache}: record one first")
        for path in cache.rglob("*"):
            if path.is_file() and path not in locks:
                path.unlink()
        held = [os.open(lock, os.O_RDWR) for lock in locks]
        for descriptor in held:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The locks belong to the open files: the child has them too, and alone once ours are closed.
        holder = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], pass_fds=held)
        holder.send_signal(signal.SIGSTOP)
        for descriptor in held:
            os.close(descriptor)
        try:
            yield Change(model=place.model)
        finally:
            _kill(holder)

    return surroundings


@contextlib.contextmanager
def cgroup(controller: str) -> Iterator[Path]:
    """A fresh group of that controller. Ends what is left in it."""
    group = CGROUPS / controller / "mgpu-corpus"
    group.mkdir()
    try:
        yield group
    finally:
        deadline = time.monotonic() + EMPTY_S
        while pids := (group / "cgroup.procs").read_text().split():
            if time.monotonic() > deadline:
                raise TimeoutError(f"cannot empty {group}: {', '.join(pids)} do not end")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.2)
        group.rmdir()


def entering(group: Path) -> tuple[str, ...]:
    """The command that runs what follows it inside the group."""
    return ("/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")


def drop_pages(folder: Path) -> None:
    """Take the files of the folder out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def copied(place: Place) -> Iterator[Path]:
    copy = place.folder / place.model.name
    shutil.copytree(place.model, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def _shards(model: Path) -> Sequence[Path]:
    return sorted(model.glob("*.safetensors"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
