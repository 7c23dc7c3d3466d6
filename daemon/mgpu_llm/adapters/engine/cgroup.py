"""A cgroup of the engine's own (version 2), where systemd delegates ours to us: nothing can leave it by forking."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from mgpu_llm.adapters.engine.tree import Stat, read_stat, send_kill

#: Where version 2 is mounted: alone, or beside version 1 (systemd's "hybrid" layout).
MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
PREFIX = "engine-"

#: The shell enters the cgroup and becomes the engine, with the same pid. 125 is nobody else's exit status.
ENTER = ("/bin/sh", "-c", 'echo $$ >"$0" || exit 125; exec "$@"')


def find_delegated(env: Mapping[str, str]) -> Path | None:
    """The daemon's own cgroup if systemd started it (INVOCATION_ID) and it may be divided; None otherwise."""
    if "INVOCATION_ID" not in env:
        return None
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), "")
    if not path:
        return None
    for mount in MOUNTS:
        own = mount / path
        # cgroup.events is in every cgroup of version 2 but the root, and in none of version 1.
        if (own / "cgroup.events").exists() and os.access(own, os.W_OK) and os.access(own / "cgroup.procs", os.W_OK):
            return own
    return None


class CgroupTree:
    """The processes of one attempt are those in its cgroup and in cgroups below it."""

    def __init__(self, parent: Path, attempt: int) -> None:
        """Makes the cgroup. Raises OSError where that is refused, or where one of this name is still there."""
        self.path = parent / f"{PREFIX}{attempt}"
        self.path.mkdir()

    def enter(self, argv: tuple[str, ...]) -> tuple[str, ...]:
        """The command line that runs `argv` inside, from its first instruction on."""
        return (*ENTER, str(self.path / "cgroup.procs"), *argv)

    def members(self, *, whole: bool = False) -> tuple[Stat, ...]:  # noqa: ARG002 - it always is
        return _alive_in(self.path)

    def kill(self) -> tuple[Stat, ...]:
        alive = self.members()
        if not self.kill_at_once():
            for stat in alive:
                send_kill(stat)
        return alive

    def kill_at_once(self) -> bool:
        """False where the kernel cannot: Linux before 5.14 has no cgroup.kill."""
        return _kill_at_once(self.path)

    def remove(self) -> str:
        try:
            _remove(self.path)
        except OSError as error:
            return f"cannot remove the cgroup '{self.path}': {error.strerror}"
        return ""


def left_behind(parent: Path, us: frozenset[int]) -> tuple[Stat, ...]:
    """Living processes in the engines' cgroups of an earlier life of the daemon, whatever they made of their environment.

    `us` are we and those above us. Nobody else is in the cgroup of a unit; where somebody is, as in the scope of a login, the
    engines may be those of another daemon there.
    """
    if not frozenset(_pids_in(parent)) <= us:
        return ()
    return tuple(stat for path in parent.glob(f"{PREFIX}*") for stat in _alive_in(path))


def remove_empty(parent: Path) -> None:
    """Removes the engines' cgroups of an earlier life of the daemon, once their processes are gone."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove(path)


def _alive_in(path: Path) -> tuple[Stat, ...]:
    stats = (read_stat(pid) for pid in _pids(path))
    return tuple(stat for stat in stats if stat is not None and stat.alive)


def _kill_at_once(path: Path) -> bool:
    try:
        (path / "cgroup.kill").write_text("1")
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    for one in reversed(_below(path)):
        os.rmdir(one)  # noqa: PTH106


def _below(top: Path) -> list[str]:
    """The cgroup and those below it, each after the one that it is in."""
    found = [str(top)]
    for path in found:
        with contextlib.suppress(OSError), os.scandir(path) as entries:  # it may be removed meanwhile
            found += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return found


def _pids(top: Path) -> list[int]:
    return [pid for path in _below(top) for pid in _pids_in(path)]


def _pids_in(path: Path | str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", "rb", buffering=0) as file:  # noqa: PTH123
            return [int(pid) for pid in file.readall().split()]
    except OSError:
        return []
