"""Which files in /dev/shm are the running engine's, written down for the case that engine and daemon die at once.

Nobody maps such files any more, and their names are no proof. What was seen held by the engine's own processes is: by device
and inode, within one boot of the host.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.engine import leftovers
from mgpu_llm.adapters.engine.leftovers import File

NAME: Final = "engine-files.json"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: A file may be mapped some time after it was made; one that is not the engine's is not looked for again and again.
LOOKS: Final = 3
LONGEST: Final = 1 << 20


class Ledger:
    """Kept in `folder`, which is this daemon's alone. What cannot be written is not known to the next life; it does no harm."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._before: frozenset[File] = frozenset()
        self._known: frozenset[File] = frozenset()
        self._looked: dict[File, int] = {}

    def begin(self) -> bool:
        """An engine will be spawned: what is there now is not its."""
        self._before, self._known, self._looked = leftovers.shared_files(), frozenset(), {}
        return True

    def new(self) -> frozenset[File]:
        """Files that are not known to be the engine's, and may be: it is worth a look who holds them."""
        there = leftovers.shared_files()
        return frozenset(file for file in there - self._before - self._known if self._looked.get(file, 0) < LOOKS)

    def look(self, new: frozenset[File], pids: Iterable[int]) -> bool:
        """Write down which of these the engine's own processes hold. May wait on a stuck process."""
        self._looked |= {file: self._looked.get(file, 0) + 1 for file in new}
        if found := leftovers.held(new, pids):
            self._known |= found
            self._write()
        return True

    def clear(self) -> bool:
        """The engine is gone, and what it left is removed."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        return True

    def remove_left(self) -> tuple[str, ...]:
        """Remove what an engine of an earlier life has left and nobody holds; to be called while none of ours runs. Returns a
        sentence for each file, and for what could not be removed. May wait on a stuck process."""
        left = self._read() & leftovers.shared_files()
        problems = leftovers.remove_unheld(left)
        gone = left - leftovers.shared_files()
        self.clear()
        told = sorted(f"removed '{leftovers.SHM / file.name}', which an engine of an earlier run left" for file in gone)
        return (*told, *problems)

    def _write(self) -> None:
        document = {"boot": _boot(), "files": [asdict(file) for file in sorted(self._known, key=lambda f: f.name)]}
        fresh = self._path.with_suffix(".new")
        with suppress(OSError):
            fresh.write_text(json.dumps(document))
            fresh.replace(self._path)

    def _read(self) -> frozenset[File]:
        """Nothing where it is another boot's, or not as we write it."""
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(LONGEST))
            boot = _boot()
            if not boot or document["boot"] != boot:
                return frozenset()
            return frozenset(
                File(name=str(row["name"]), device=str(row["device"]), inode=int(row["inode"]))
                for row in document["files"]
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return frozenset()


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
