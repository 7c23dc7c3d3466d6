"""What the NVIDIA driver says of a GPU in the kernel's log, by its number (Xid), and what it means: xids.toml beside this module.

The forms of a line, of drivers from before 2012 to r610: "NVRM: Xid (0000:03:00): 13, ...",
"NVRM: Xid (PCI:0000:41:00): 79, pid=1234, name=python3, GPU has fallen off the bus.", of a part of a GPU (MIG)
"NVRM: Xid (PCI:0000:17:00 GPU-I:05): 43, ...", without a number "NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", and of
a switch between GPUs "nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 30 LTSSM Fault Up".
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from typing import Any, Final

_XID: Final = re.compile(
    r"NVRM: Xid \((?:PCI:)?(?P<gpu>[0-9a-fA-F:.]+)[^)]{0,40}\): (?P<number>[0-9]{1,6}),?(?P<rest>.*)"
)
_OFF_THE_BUS: Final = re.compile(r"NVRM: GPU (?P<gpu>[0-9a-fA-F:.]+): GPU has fallen off the bus")
_SWITCH: Final = re.compile(
    r"SXid \((?:PCI:)?[0-9a-fA-F:.]+\): (?P<number>[0-9]{1,6}), (?P<severity>Fatal|Non-fatal)\b"
)
_RECOVERY: Final = re.compile(r"recovery action changed from \S+ \([^)]*\) to 0x(?P<to>[0-9a-fA-F]{1,4})\b")
_NOT_FATAL: Final = re.compile(r"\b[Nn]on-?[Ff]atal\b")
FALLEN_OFF: Final = 79
RECOVERY_CHANGED: Final = 154


class Action(StrEnum):
    """What must happen, from bad to harmless; what each means is said in xids.toml."""

    LOST = "lost"
    REBOOT = "reboot"
    RESET = "reset"
    DRAIN = "drain"
    APPLICATION = "application"
    CONTACT = "contact"
    IGNORE = "ignore"


#: With these nothing runs on the GPU any more.
UNFIT: Final = frozenset({Action.LOST, Action.REBOOT, Action.RESET})
#: nvml.h (NVML 615), nvmlDeviceGpuRecoveryAction_t, which Xid 154 tells too: 3 is to end all that uses peer-to-peer, and to ask
#: again; 4 serves on; 5 is about GPUs of several hosts; 6 is the bus's own way to reset; 7 is the host.
RECOVERIES: Final[Mapping[int, Action]] = {
    0: Action.IGNORE,
    1: Action.RESET,
    2: Action.REBOOT,
    3: Action.RESET,
    4: Action.DRAIN,
    5: Action.DRAIN,
    6: Action.RESET,
    7: Action.REBOOT,
}
#: What an admin can do.
ADVICE: Final[Mapping[Action, str]] = {
    Action.LOST: "reboot the host; look at power, heat and seating of the GPU, and leave it out of gpus.use until then",
    Action.REBOOT: "reboot the host; until then the GPU cannot be used",
    Action.RESET: "reset the GPU while nothing runs on it (nvidia-smi --gpu-reset) or reboot the host",
    Action.DRAIN: "it serves on; reset the GPU (nvidia-smi --gpu-reset) when the service can be stopped",
    Action.APPLICATION: "the GPU is sound; if it comes again, and of this GPU only, have it tested",
    Action.CONTACT: "watch it; if it comes again, ask the vendor",
    Action.IGNORE: "nothing is to be done",
}


@dataclass(frozen=True, kw_only=True)
class Xid:
    """One error of one GPU, as a line of the kernel told it. `gpu` is the PCI address as it stands there, `what` goes after
    "GPU 3 needs a reset: ". `certain`: the driver itself says what is to be done, and it is not only the rule for the number."""

    number: int
    gpu: str
    action: Action
    what: str
    certain: bool = False


@dataclass(frozen=True, kw_only=True)
class SwitchError:
    """An error of a switch between GPUs (SXid). A fatal one ends all that the GPUs of its links do."""

    number: int
    fatal: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    what: str
    action: Action
    severity: bool
    bucket: str


def load() -> dict[int, Entry]:
    """The catalogue, by number."""
    text = resources.files(__package__).joinpath("xids.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["xid"]
    return {number: _entry(row) for row in rows for number in row["numbers"]}


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(
        what=row["what"], action=Action(row["action"]), severity=row.get("severity", False), bucket=row["bucket"]
    )


CATALOGUE: Final = load()
_UNKNOWN: Final = Entry(
    what="an error that no catalogue explains", action=Action.CONTACT, severity=False, bucket="none"
)


def read(text: str) -> Xid | None:
    """The error that the line tells of, None where it is none of a GPU."""
    if (fallen := _OFF_THE_BUS.search(text)) is not None:
        return _known(FALLEN_OFF, fallen["gpu"], text)
    found = _XID.search(text)
    if found is None:
        return None
    number = int(found["number"])
    return _recovery(found) if number == RECOVERY_CHANGED else _known(number, found["gpu"], found["rest"])


def of_switch(text: str) -> SwitchError | None:
    """The switch's error that the line tells of."""
    found = _SWITCH.search(text)
    return None if found is None else SwitchError(number=int(found["number"]), fatal=found["severity"] == "Fatal")


def _known(number: int, gpu: str, rest: str) -> Xid:
    entry = CATALOGUE.get(number, _UNKNOWN)
    harmless = entry.severity and _NOT_FATAL.search(rest) is not None
    action = Action.IGNORE if harmless else entry.action
    return Xid(number=number, gpu=gpu, action=action, what=entry.what, certain=action is Action.LOST)


def _recovery(found: re.Match[str]) -> Xid:
    told = _RECOVERY.search(found["rest"])
    action = Action.CONTACT if told is None else RECOVERIES.get(int(told["to"], 16), Action.CONTACT)
    what = "the driver says what is to be done for it to recover"
    return Xid(number=RECOVERY_CHANGED, gpu=found["gpu"], action=action, what=what, certain=action in UNFIT)
