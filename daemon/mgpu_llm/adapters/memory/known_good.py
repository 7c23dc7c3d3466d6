"""The rung that served last on disk, in `<state_dir>/known-good.json`.

To be wired so; none of it raises because of the disk:

    rung = KnownGoodRung(state_dir)       None for the folder: remembers as long as the daemon lives
    rung.known                            KnownGood, or None: nothing is known
    rung.remember(known)                  takes hold at once, and is written, or removed (None), beside the loop
    rung.close()                          when the loop has ended; waits at most 2 s for what is being written
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mgpu_llm.adapters.memory.file import File
from mgpu_llm.core.known_good import KnownGood, from_json, to_json

NAME: Final = "known-good.json"


class KnownGoodRung:
    """Made before the loop begins: it reads the file. One that is broken, or none of ours, is moved aside with a warning
    and nothing is known. The methods belong to one thread, the loop's."""

    def __init__(self, state_dir: Path | None) -> None:
        self._file = File(state_dir and state_dir / NAME)
        self.known: KnownGood | None = self._file.read(from_json)

    def remember(self, known: KnownGood | None) -> None:
        self.known = known
        self._file.keep(None if known is None else to_json(known))

    def close(self) -> None:
        self._file.close()
