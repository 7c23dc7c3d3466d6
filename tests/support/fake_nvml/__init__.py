"""A driver for tests: a C library that answers as libnvidia-ml.so.1 does, loaded by the real pynvml in a child process.

    nvml = FakeNvml(tmp_path, build(tmp_path))                  # one compilation for a whole session: build(getbasetemp())
    nvml.set([FakeGpu(), FakeGpu(used_bytes=7)])                # the host has two GPUs from now on
    subprocess.Popen([MGPUD, ...], env={**os.environ, **nvml.environment()})
    nvml.change(1, lost=True)                                   # the running process finds it at its next call
    nvml.set([FakeGpu()] * 8, ["nvmlDeviceGetMemoryInfo block gpu 3"])

Everything is in one control file, which every call of every process on it looks at: what a test changes holds from the
next call on, also for a call that blocks meanwhile. Until the first set() there is no driver.

- The GPUs: 0 to 16, each a FakeGpu; what it holds and who uses it, and the rest that NVML tells of it.
- What joins them, for `set`: `nvlinks`, pairs of indices; `p2p`, (read, write) by pair, and `ancestors`, both as nvml.h
  numbers them. Pairs that are not named have no NVLink, P2P that works, and the same NUMA node.
- What a GPU does not tell: `recovery=None`, a process with None bytes, and for all else the fault "<call> error 3".
- Faults, for `set`: "<call> error <nvmlReturn_t>", "<call> block" (until it is taken out) or "<call> slow
  <milliseconds>", each on every GPU or with " gpu <index>" behind.
  <call> is NVML's own name; without a _v2 or _v3 it stands for each version of the call.
- A GPU with `lost` or `reset_required` answers every call with error 15 or 16. It stays so for a process that has noticed,
  as with the real driver, until NVML is initialised anew there.
- `slices`, (UUID, bytes) each, turn MIG on; of the first `slice_used_bytes` are used. A slice is found by its UUID, has its GPU's
  processes, and tells no utilisation.
- calls() tells who called what; text that set() cannot say is for write(), by the grammar in control.h.
"""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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


_Processes = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """One GPU of the fake driver. `uuid` None takes the library's own (asked.uuid); a process is (pid, bytes or None: not
    told), and one that both computes and draws is in `processes` and in `graphics`. `recovery` and `compute_mode` are
    numbers of nvml.h; `recovery` None is not told. `slices` are MIG's, as (UUID, bytes), of which the first has
    `slice_used_bytes` in use."""

    name: str = "NVIDIA H200"
    uuid: str | None = None
    total_bytes: int = 150_754_820_096
    used_bytes: int = 0
    reserved_bytes: int = 0
    utilisation_percent: int = 0
    power_mw: int = 75_000
    power_limit_mw: int = 700_000
    temperature_c: int = 30
    processes: _Processes = ()
    graphics: _Processes = ()
    ecc: bool = True
    ecc_errors: int = 0
    persistence: bool = True
    compute_mode: int = 0
    recovery: int | None = 0
    slices: tuple[tuple[str, int], ...] = ()
    slice_used_bytes: int = 0
    lost: bool = False
    reset_required: bool = False

    def line(self, index: int) -> str:
        """Its line in the control file."""
        words = [f"gpu {index} total {self.total_bytes} used {self.used_bytes} reserved {self.reserved_bytes}"]
        words += [f"util {self.utilisation_percent} power {self.power_mw}"]
        words += [f"limit {self.power_limit_mw} temperature {self.temperature_c}"]
        words += [f"ecc {self.ecc:d} ecc-errors {self.ecc_errors} persistence {self.persistence:d}"]
        words += [f"compute-mode {self.compute_mode} recovery {_told(self.recovery)}"]
        words += [f"proc {pid} {_told(used)}" for pid, used in self.processes]
        words += [f"graphics {pid} {_told(used)}" for pid, used in self.graphics]
        used = [f"slice-used {self.slice_used_bytes}"] if self.slice_used_bytes else []
        words += [
            " ".join([f"slice {uuid} {size}", *(used if at == 0 else ())])
            for at, (uuid, size) in enumerate(self.slices)
        ]
        words += [f"uuid {self.uuid}"] if self.uuid else []
        words += ["lost"] if self.lost else []
        words += ["reset-required"] if self.reset_required else []
        return " ".join([*words, f"name {self.name}"])


def _told(number: int | None) -> str:
    return "unknown" if number is None else str(number)


class FakeNvml:
    """One fake driver: its control file and call log under `home`, its library in `library` (see build)."""

    def __init__(self, home: Path, library: Path) -> None:
        self._library = library
        self.home = home
        self._control = home / "nvml-control"
        self._calls = home / "nvml-calls"
        self._gpus: list[FakeGpu] = []
        self._rest: list[str] = []

    def set(
        self,
        gpus: Sequence[FakeGpu],
        faults: Sequence[str] = (),
        *,
        nvlinks: Sequence[tuple[int, int]] = (),
        p2p: Mapping[tuple[int, int], tuple[int, int]] | None = None,
        ancestors: Mapping[tuple[int, int], int] | None = None,
    ) -> None:
        """From now on the host has these GPUs and these faults, and nothing of what was set before."""
        self._gpus = list(gpus)
        self._rest = [f"nvlink {one} {other}" for one, other in nvlinks]
        for (one, other), (read, written) in (p2p or {}).items():
            self._rest.append(f"p2p {one} {other} read {read} write {written}")
        self._rest += [f"ancestor {one} {other} {level}" for (one, other), level in (ancestors or {}).items()]
        self._rest += [f"fault {fault}" for fault in faults]
        self._write()

    def change(self, index: int, **fields: Any) -> None:
        """From now on these fields of GPU `index` are so, and all else is as set() has it."""
        self._gpus[index] = replace(self._gpus[index], **fields)
        self._write()

    def _write(self) -> None:
        lines = [gpu.line(index) for index, gpu in enumerate(self._gpus)]
        self.write("".join(f"{line}\n" for line in [*lines, *self._rest]))

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
