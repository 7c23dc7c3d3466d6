"""A driver for tests: a C library that answers as libnvidia-ml.so.1 does, loaded by the real pynvml in a child process.

control.h says what its control file can hold; a process that runs on it sees a change of that file at its next call.
"""

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

SONAME = "libnvidia-ml.so.1"
_HERE = Path(__file__).parent
_COMPILE = ("gcc", "-std=gnu11", "-D_GNU_SOURCE", "-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-Wall", "-Wextra")


def build(directory: Path) -> Path:
    """The folder under `directory` that holds the library, compiled only if this source was not yet; needs gcc."""
    sources = sorted(_HERE.glob("*.[ch]"))
    text = b"".join(source.read_bytes() for source in sources)
    key = hashlib.sha256(text + repr(_COMPILE).encode()).hexdigest()[:16]
    home = directory / f"fake-nvml-{key}"
    if not (home / SONAME).exists():
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home) as scratch:
            made = Path(scratch) / SONAME
            units = [str(source) for source in sources if source.suffix == ".c"]
            subprocess.run([*_COMPILE, f"-Wl,-soname,{SONAME}", *units, "-o", str(made)], check=True)
            made.replace(home / SONAME)  # whole or not at all, for builds side by side
    return home


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """One GPU of the fake driver. `uuid` None takes the library's own; a process is (pid, bytes or None: not told)."""

    name: str = "NVIDIA H200"
    uuid: str | None = None
    total_bytes: int = 150_754_820_096
    used_bytes: int = 0
    reserved_bytes: int = 0
    utilisation_percent: int = 0
    power_mw: int = 75_000
    processes: tuple[tuple[int, int | None], ...] = ()
    recovery: int | None = 0
    lost: bool = False
    reset_required: bool = False

    def line(self, index: int) -> str:
        """Its line in the control file."""
        words = [f"gpu {index} total {self.total_bytes} used {self.used_bytes} reserved {self.reserved_bytes}"]
        words += [f"util {self.utilisation_percent} power {self.power_mw}"]
        words += [f"proc {pid} {'unknown' if used is None else used}" for pid, used in self.processes]
        words += [f"uuid {self.uuid}"] if self.uuid else []
        words += [f"recovery {'unknown' if self.recovery is None else self.recovery}"] if self.recovery != 0 else []
        words += ["lost"] if self.lost else []
        words += ["reset-required"] if self.reset_required else []
        return " ".join([*words, f"name {self.name}"])


class FakeNvml:
    """One fake driver: its control file and call log under `home`, its library in `library` (see build).

    There is no driver until the first set().
    """

    def __init__(self, home: Path, library: Path) -> None:
        self._library = library
        self._control = home / "nvml-control"
        self._calls = home / "nvml-calls"

    def set(
        self, gpus: Sequence[FakeGpu], faults: Sequence[str] = (), *, nvlinks: Sequence[tuple[int, int]] = ()
    ) -> None:
        """From now on the host has these GPUs, NVLink between these pairs of indices, and these faults: "<call> error
        <code>" or "<call> block", and " gpu <i>"."""
        lines = [gpu.line(index) for index, gpu in enumerate(gpus)]
        lines += [f"nvlink {one} {other}" for one, other in nvlinks]
        lines += [f"fault {fault}" for fault in faults]
        self.write("".join(f"{line}\n" for line in lines))

    def write(self, text: str) -> None:
        """The control file's whole text, put in place at once."""
        fresh = self._control.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._control)

    def unload(self) -> None:
        """The driver is gone, as before the first set()."""
        self._control.unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment, besides its own, to run on this driver."""
        return {
            "LD_LIBRARY_PATH": str(self._library),
            "FAKE_NVML_CONTROL": str(self._control),
            "FAKE_NVML_CALLS": str(self._calls),
        }

    def calls(self) -> tuple[tuple[str, int, int], ...]:
        """Every call so far: its name, process id and thread id. All three ways to initialise are "nvmlInit_v2"."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return tuple((name, int(pid), int(tid)) for name, pid, tid in (line.split() for line in lines))
