"""The disks of the engine's caches and of what the daemon remembers: space, and whether the user may write there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host import surroundings
from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject, gib, listed
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("disks")
#: Compiled kernels and graphs of one model take up to a few gigabytes.
CACHES_BYTES: Final = 5 << 30
#: Without any of it a compilation fails.
NOTHING_BYTES: Final = 512 << 20
STATE: Final = "the state folder"
NETWORKS: Final = re.compile(
    r"nfs\d?|cifs|smb3|9p|ceph|lustre|beegfs|gpfs|afs|glusterfs|fuse\..*|fuseblk|fuse|virtiofs"
)
#: What has compiled code in it that is loaded as a library: a mount with noexec refuses that.
_CODE: Final = frozenset(
    {
        "TMPDIR",
        "VLLM_CACHE_ROOT",
        "XDG_CACHE_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_EXTENSIONS_DIR",
        "TRITON_CACHE_DIR",
    }
)


#: Only where the others are not set: hardened hosts have such a /tmp, and do.
_CODE_PERHAPS: Final = frozenset({"TMPDIR", "XDG_CACHE_HOME"})


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One line of /proc/self/mounts."""

    place: str
    kind: str
    options: frozenset[str]

    @property
    def network(self) -> bool:
        return NETWORKS.fullmatch(self.kind) is not None


def mounts(text: str) -> list[Mount]:
    """From /proc/self/mounts, in which blanks are written as \\040."""
    rows = (line.split(" ") for line in text.splitlines())
    return [
        Mount(place=_unescaped(row[1]), kind=row[2], options=frozenset(row[3].split(",")))
        for row in rows
        if len(row) > 3
    ]


def mount_of(path: str, known: list[Mount]) -> Mount | None:
    """Where a real path lies: the longest place above it, and of those the one that was mounted last."""
    above = [mount for mount in known if path == mount.place or path.startswith(mount.place.rstrip("/") + "/")]
    return max(reversed(above), key=lambda mount: len(mount.place), default=None)


def check(
    system: System, environ: Mapping[str, str], state_dir: str, who: Account, made: Sequence[str] = ()
) -> Iterator[Finding]:
    """`environ` is the engine's, and `made` are folders that systemd will make for the user. A network's disk that is gone makes
    this wait for ever: it needs a deadline."""
    places = {**surroundings.places(environ), STATE: state_dir}
    known = mounts(system.text("/proc/self/mounts"))
    disks = dict[str, list[str]]()
    for what, place in places.items():
        mount = mount_of(str(_nearest(Path(place)).resolve()), known)
        disks.setdefault(mount.place if mount else "/", []).append(what)
        if mount and what in _CODE and "noexec" in mount.options:
            seen = f"{what} ({place}) is on {mount.place}, mounted noexec: kernels compiled there cannot be loaded"
            said = SUBJECT.warning if what in _CODE_PERHAPS else SUBJECT.problem
            yield said("disks-noexec", seen, f"sudo mount -o remount,exec {mount.place}, or another {what}")
    kinds = {mount.place: mount.kind for mount in known}
    for place, whats in disks.items():
        yield _space(place, kinds.get(place, ""), whats)
    yield from _writable(places, who, made)


def room(free: int, total: int, where: str, whats: list[str]) -> Finding:
    """Of one disk, in bytes; `where` is how it is called."""
    seen = f"{where}: {gib(free)} free of {gib(total)} ({listed(whats, 3)})"
    largest = f"du -xh --max-depth=2 {where.partition(' ')[0]} | sort -h | tail"
    cure = f"{largest} shows what to remove; or move the caches (HF_HOME, VLLM_CACHE_ROOT)"
    if free < NOTHING_BYTES:
        return SUBJECT.problem("disks-space", seen, cure)
    return SUBJECT.warning("disks-space", seen, cure) if free < CACHES_BYTES else SUBJECT.ok("disks-space", seen)


def _space(place: str, kind: str, whats: list[str]) -> Finding:
    try:
        disk = os.statvfs(place)
    except OSError as error:
        return SUBJECT.unknown("disks-space", f"cannot look at {place}: {(error.strerror or '').lower()}")
    where = f"{place} ({kind})" if kind else place
    if disk.f_files and disk.f_favail == 0:
        return SUBJECT.problem("disks-space", f"{where} has no inode left", "remove files: many small ones fill it")
    return room(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize, where, whats)


def _writable(places: Mapping[str, str], who: Account, made: Sequence[str]) -> Iterator[Finding]:
    given = [what for what, place in places.items() if any(Path(place).is_relative_to(folder) for folder in made)]
    nearest = {what: _nearest(Path(place)) for what, place in places.items() if what not in given}
    may = account.access(who, list(nearest.values()))
    if may is None:
        why = f"only root, or {who.name}, can find out where {who.name} may write"
        yield SUBJECT.unknown("disks-write", why, f"sudo mgpuctl doctor --user {who.name}")
        return
    closed = dict[Path, list[str]]()
    for what, can in zip(nearest, may, strict=True):
        if not {"w", "x"} <= set(can):
            closed.setdefault(nearest[what], []).append(what)
    if not closed:
        yield SUBJECT.ok("disks-write", f"{who.name} may write in all {len(places)} places, by their permissions")
    for folder, whats in closed.items():
        seen = f"{who.name} may not write in {folder} ({', '.join(f'{what}: {places[what]}' for what in whats)})"
        caches = [what for what in whats if what != STATE]
        cure = f"{_admission(folder, [places[what] for what in whats], who)}"
        cure += f", or set {', '.join(caches)} in engine.env" if caches else ", or set daemon.state_dir"
        # Without its state the daemon can still serve.
        yield (SUBJECT.problem if caches else SUBJECT.warning)("disks-write", seen, cure)


def _admission(nearest: Path, wanted: list[str], who: Account) -> str:
    """What lets the user in. A folder that is there may be others' too: its owner and its mode are left alone."""
    if not nearest.is_dir():
        return f"{nearest} is no folder: move it away"
    missing = [place for place in wanted if Path(place) != nearest]
    made = [f"sudo install -d -o {who.name} {' '.join(missing)}"] if missing else []
    opened = [f"sudo setfacl -m u:{who.name}:rwx {nearest}"] if len(missing) < len(wanted) else []
    return "; ".join([*opened, *made])


def _nearest(path: Path) -> Path:
    """What is there of a path's way."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _unescaped(place: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)
