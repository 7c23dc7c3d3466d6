"""The host's successful starts on disk, in `<state_dir>/history.json`.

To be wired so; none of it raises because of the disk:

    history = History(state_dir)          None for the folder: remembers as long as the daemon lives
    history.starts                        tuple[PastStart, ...], the newest last
    history.remember(PastStart(...))      takes hold at once, and is written beside the loop
    history.close()                       when the loop has ended; waits at most 2 s for what is being written
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mgpu_llm.adapters.memory.file import File
from mgpu_llm.core.history import PastStart, from_json, to_json, with_start

NAME: Final = "history.json"


class History:
    """Made before the loop begins: it reads the file. One that is broken, or none of ours, is moved aside with a warning
    and the history is empty. The methods belong to one thread, the loop's."""

    def __init__(self, state_dir: Path | None) -> None:
        self._file = File(state_dir and state_dir / NAME)
        self.starts: tuple[PastStart, ...] = self._file.read(from_json) or ()

    def remember(self, start: PastStart) -> None:
        self.starts = with_start(self.starts, start)
        self._file.keep(to_json(self.starts))

    def close(self) -> None:
        self._file.close()
