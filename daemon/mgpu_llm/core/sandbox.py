"""What a unit of systemd keeps its service from writing, in words: whose unit it is, and what opens a place.

systemd.exec(5), ProtectSystem= and ReadWritePaths=, of version 252.
"""

from __future__ import annotations

import re
from typing import Final

#: A line of /proc/self/cgroup: number, controllers, path. The unit is the last of the path that is a service: below it we divide.
#: What a user's own systemd has begun is below user.slice, and its units are others.
_SERVICE: Final = re.compile(r"^[^:\n]*:[^:\n]*:(?!/user\.slice/).*/([^/\n]+)\.service(?:/[^\n]*)?$", re.MULTILINE)
_ESCAPED: Final = re.compile(r"\\x([0-9a-f]{2})")


def unit_of(control_groups: str) -> str:
    """The service, as systemctl takes it, that has these control groups, from /proc/self/cgroup; "" where none has."""
    found = _SERVICE.search(control_groups)
    return _ESCAPED.sub(lambda code: chr(int(code[1], 16)), found[1]) if found else ""


def opened(unit: str, place: str, *more: str) -> str:
    """What makes a place of the host writable to a unit, as something to do; `more` are other settings that it takes."""
    return f"sudo systemctl edit {unit}: {', '.join([*more, f'ReadWritePaths={written(place)}'])} under [Service]"


def written(path: str) -> str:
    """A path as a unit's file has it: with %% for %, and in quotes where it has a blank."""
    path = path.replace("%", "%%")
    return f'"{path}"' if re.search(r"\s", path) else path
