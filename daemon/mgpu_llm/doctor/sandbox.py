"""What the service's unit leaves of the file system: where engine and daemon may write, and what they cannot see.

systemd.exec(5) of version 252, "Sandboxing". Nothing of it shows in permissions, and a shell is not under it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.host import surroundings
from mgpu_llm.config import engine_args as options
from mgpu_llm.config import model
from mgpu_llm.config.endpoint import listening
from mgpu_llm.config.parse import Loaded
from mgpu_llm.core.sandbox import opened, written
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject

SUBJECT: Final = Subject("unit")
STATE: Final = "daemon.state_dir"
RUNTIME: Final = "daemon.runtime_dir"
CONFIG: Final = "the config"
TEMPORARY: Final = "TMPDIR"
#: What of a unit is asked for.
PROPERTIES: Final = (
    "ProtectSystem",
    "ProtectHome",
    "PrivateTmp",
    "ReadWritePaths",
    "BindPaths",
    "BindReadOnlyPaths",
    "StateDirectory",
    "CacheDirectory",
    "RuntimeDirectory",
    "LogsDirectory",
)
_MADE: Final = {
    "StateDirectory": "/var/lib",
    "CacheDirectory": "/var/cache",
    "RuntimeDirectory": "/run",
    "LogsDirectory": "/var/log",
}
_SYSTEM: Final = {
    "yes": ("/usr", "/boot", "/efi"),
    "full": ("/usr", "/boot", "/efi", "/etc"),
    "strict": ("/",),
}
_KERNELS: Final = ("/dev", "/proc", "/sys")
_HOMES: Final = ("/home", "/root", "/run/user")
_TEMPORARIES: Final = ("/tmp", "/var/tmp")  # noqa: S108 - the places themselves are meant
#: Folders of vLLM's that are made where a variable says, beside the caches (vllm/envs.py; the profiler's up to 0.12).
_VARIABLES: Final = ("VLLM_CONFIG_ROOT", "VLLM_ASSETS_CACHE", "VLLM_TORCH_PROFILER_DIR", "PROMETHEUS_MULTIPROC_DIR")
_DOWNLOADS: Final = ("--download-dir",)
#: As in --profiler-config.torch_profiler_dir=/x and in --profiler-config '{"torch_profiler_dir": "/x"}' (vLLM 0.32.0).
_PROFILES: Final = re.compile(r"torch[_-]profiler[_-]dir\W*[\s=:\"'](/[^\s\"',}]+)")


class View(Enum):
    """What the service has of a place: it may write there, or only read; it has a folder of its own there; it sees nothing."""

    WRITTEN = "written"
    READ = "read"
    OWN = "own"
    HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """`rules` say it of folders and all that is below them: the longest holds, and of equal ones the last. `made` are folders
    that systemd makes at each start, and gives to the service's user."""

    rules: tuple[tuple[str, View], ...] = ()
    made: tuple[str, ...] = ()

    def view(self, place: str) -> View:
        """Of an absolute path without links."""
        above = [rule for rule in self.rules if _is_below(place, rule[0])]
        return max(reversed(above), key=lambda rule: len(rule[0]), default=("/", View.WRITTEN))[1]


def of_unit(told: Mapping[str, str]) -> Sandbox:
    """From what `systemctl show` says of PROPERTIES."""
    system = told.get("ProtectSystem", "no")
    rules = [(folder, View.READ) for folder in _SYSTEM.get(system, ())]
    rules += [(folder, View.WRITTEN) for folder in _KERNELS if system == "strict"]
    home = told.get("ProtectHome", "no")
    if home != "no":
        rules += [(folder, View.READ if home == "read-only" else View.HIDDEN) for folder in _HOMES]
    if told.get("PrivateTmp", "no") != "no":
        rules += [(folder, View.OWN) for folder in _TEMPORARIES]
    covered = [folder for folder, view in rules if view in (View.OWN, View.HIDDEN)]
    # In what is covered nothing is found that could be opened: only a mount from outside brings it back.
    paths = [_real(path.lstrip("-+")) for path in _words(told.get("ReadWritePaths", ""))]
    rules += [(path, View.WRITTEN) for path in paths if not any(_is_below(path, folder) for folder in covered)]
    made = [f"{above}/{folder}" for name, above in _MADE.items() for folder in _words(told.get(name, ""))]
    rules += [(folder, View.WRITTEN) for folder in made]
    rules += [(_target(mount), View.READ) for mount in _words(told.get("BindReadOnlyPaths", ""))]
    rules += [(_target(mount), View.WRITTEN) for mount in _words(told.get("BindPaths", ""))]
    return Sandbox(rules=tuple(rules), made=tuple(made))


def writes(loaded: Loaded | None, environ: Mapping[str, str], state_dir: str) -> dict[str, str]:
    """Where engine and daemon must write, by what says so; `environ` is the engine's."""
    found = {**surroundings.places(environ), **{name: environ.get(name, "") for name in _VARIABLES}, STATE: state_dir}
    if loaded is not None:
        config = loaded.config
        profiles = _PROFILES.search(" ".join(config.engine.args))
        found[RUNTIME] = config.daemon.runtime_dir
        found["--download-dir"] = options.value(config.engine.args, _DOWNLOADS) or ""
        found["torch_profiler_dir"] = profiles[1] if profiles else ""
        found["--uds"] = str(Path(listening(config).uds or "").parent)
    return {what: place for what, place in found.items() if place.startswith("/")}


def reads(loaded: Loaded, program: str) -> dict[str, str]:
    """What they must find, likewise; `program` is the engine's, "" where nobody knows."""
    folder = model.local_path(loaded.config.model.path)
    found = {"the model": str(folder or ""), "the engine": program, CONFIG: str(loaded.main.absolute())}
    return {what: place for what, place in found.items() if place.startswith("/")}


def check(
    sandbox: Sandbox, unit: str, written_to: Mapping[str, str], read_from: Mapping[str, str], who: Account
) -> Iterator[Finding]:
    """`unit` is how systemctl calls it. Follows links: a network's disk that is gone makes this wait for ever."""
    closed = [*_closed(sandbox, unit, written_to, who), *_passing(sandbox, written_to)]
    yield from closed
    if not closed:
        yield SUBJECT.ok("unit-write", f"{unit} leaves all {len(written_to)} places writable")
    unseen = list(_unseen(sandbox, unit, read_from))
    yield from unseen
    if read_from and not unseen:
        yield SUBJECT.ok("unit-read", f"{unit} leaves model, engine and config to be seen")


def _closed(sandbox: Sandbox, unit: str, places: Mapping[str, str], who: Account) -> Iterator[Finding]:
    """What is below another closed place is opened with that."""
    groups = dict[str, list[str]]()
    for what, place in sorted(places.items(), key=lambda item: item[1]):
        if sandbox.view(_real(place)) in (View.READ, View.HIDDEN):
            above = next((other for other in groups if _is_below(place, other)), place)
            groups.setdefault(above, []).append(what)
    for place, whats in groups.items():
        hidden = sandbox.view(_real(place)) is View.HIDDEN
        made = [] if Path(place).is_dir() else [f"sudo install -d -o {who.name} {shlex.quote(place)}"]
        cure = "; ".join([*made, opened(unit, place, *(["ProtectHome=read-only"] if hidden else []))])
        how = "hides it (ProtectHome)" if hidden else "makes it read-only (ProtectSystem, ProtectHome)"
        seen = f"{place} ({', '.join(whats)}) is to be written, and the unit {unit} {how}"
        # Without the folder of its socket the daemon ends at once.
        yield (SUBJECT.problem if RUNTIME in whats else SUBJECT.warning)("unit-write", seen, cure)


def _passing(sandbox: Sandbox, places: Mapping[str, str]) -> Iterator[Finding]:
    for what, place in places.items():
        if what != TEMPORARY and sandbox.view(_real(place)) is View.OWN:
            seen = f"{place} ({what}) is in the unit's own /tmp (PrivateTmp), which nobody else sees and which goes at each stop"
            yield SUBJECT.warning("unit-write", seen, f"set {what} to a place outside of /tmp and /var/tmp")


def _unseen(sandbox: Sandbox, unit: str, places: Mapping[str, str]) -> Iterator[Finding]:
    for what, place in places.items():
        # A link is no way out: it is looked for where it lies, and then where it leads.
        views = {sandbox.view(path) for path in (place, _real(place))}
        edit = f"sudo systemctl edit {unit}"
        if View.OWN in views:
            seen = f"{what} is below {place}, and the unit {unit} has a /tmp of its own (PrivateTmp)"
            cure = f"move it, as to /srv or /opt; or {edit}: BindReadOnlyPaths={written(place)} under [Service]"
        elif View.HIDDEN in views:
            seen = f"{what} is below {place}, which the unit {unit} hides (ProtectHome)"
            cure = f"{edit}: ProtectHome=read-only under [Service]"
        else:
            continue
        # The unit names its own config, which may be another.
        yield (SUBJECT.warning if what == CONFIG else SUBJECT.problem)("unit-read", seen, cure)


def _is_below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip("/") + "/")


def _real(place: str) -> str:
    return str(Path(place).resolve())


def _target(mount: str) -> str:
    """Of "SOURCE:TARGET:OPTIONS", of which the source alone may be there."""
    source, target = [*mount.lstrip("-").split(":"), ""][:2]
    return (target or source).rstrip("/") or "/"


def _words(text: str) -> Sequence[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()
