"""The user who will run the daemon, and what that user may open."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host.program import RunAs

#: Under whom the unit runs.
SERVICE: Final = "mgpu-llm"
LIMIT_S: Final = 4.0
#: "e", "r", "w" and "x" for what there is and may be done with each argument, one line each. The shell asks the kernel, which
#: knows of access lists and of network shares that trust no root.
_ASK: Final = """\
for path; do
  may=
  [ -e "$path" ] && may=e
  [ -r "$path" ] && may=${may}r
  [ -w "$path" ] && may=${may}w
  [ -x "$path" ] && may=${may}x
  echo "$may."
done
"""


@dataclass(frozen=True, kw_only=True)
class Account:
    """`groups` are all that the user is in, by number."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def group_names(self) -> list[str]:
        return sorted(_group(gid) for gid in self.groups)


def other(who: Account) -> RunAs | None:
    """As whom a program of that user's is to be run: None as ourselves, where that is the same user or where we may not."""
    if who.uid == os.geteuid() or os.geteuid() != 0:
        return None
    return RunAs(uid=who.uid, gid=who.gid, groups=who.groups)


def account(name: str | None) -> Account:
    """The user of that name; without one the service's, if we are root and there is such a user, else our own.

    Raises LookupError, whose text says what to do."""
    if name is None and os.geteuid() == 0:
        name = SERVICE if _known(SERVICE) else None
    try:
        entry = pwd.getpwuid(os.geteuid()) if name is None else pwd.getpwnam(name)
    except KeyError:
        if name is None:  # a container's number without a name
            return _nameless()
        raise LookupError(f'there is no user "{name}"; see `getent passwd`') from None
    own = entry.pw_uid == os.geteuid() and name is None
    groups = os.getgroups() if own else os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(
        name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, groups=tuple(sorted(groups)), home=entry.pw_dir
    )


def access(who: Account, paths: Sequence[Path]) -> list[str] | None:
    """For each path which of "e" (it is there), "r", "w" and "x" hold for that user; None where only root could find out. Blocks,
    four seconds at most."""
    if not paths:
        return []
    if who.uid != os.geteuid() and os.geteuid() != 0:
        return None
    other = who.uid != os.geteuid()
    try:
        said = subprocess.run(
            ["/bin/sh", "-c", _ASK, "sh", *map(str, paths)],
            cwd="/",
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
            check=True,
            user=who.uid if other else None,
            group=who.gid if other else None,
            extra_groups=list(who.groups) if other else None,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    told = [line.rstrip(".") for line in said.stdout.decode("ascii", "replace").splitlines()]
    return told if len(told) == len(paths) else None


def owner(path: Path) -> tuple[str, int]:
    """The name of a file's group, and its mode's permissions. Raises OSError."""
    stat = path.stat()
    return _group(stat.st_gid), stat.st_mode & 0o777


def _known(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _nameless() -> Account:
    uid = os.geteuid()
    return Account(name=f"uid {uid}", uid=uid, gid=os.getegid(), groups=tuple(sorted(os.getgroups())), home="/")
