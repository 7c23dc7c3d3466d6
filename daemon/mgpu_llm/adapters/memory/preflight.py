"""What has passed a preflight, in `<state_dir>/preflight.json`: it need not be tried again until something changes.

To be wired so; none of it raises because of the disk:

    passes = PassedPreflights(state_dir)  None for the folder: remembers as long as the daemon lives
    passes.passed(key)                    whether what `key` stands for has passed
    passes.gib_per_s(key)                 how fast it was then; None where that was not measured
    passes.remember(key, gib_per_s)       takes hold at once, and is written beside the loop
    passes.forget()                       nothing has passed any more
    passes.close()                        when the loop has ended; waits at most 2 s for what is being written
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.memory.file import File

NAME: Final = "preflight.json"
FORMAT: Final = 1
MOST: Final = 32
LONGEST_KEY: Final = 200
#: GiB a second; beyond it is no speed, and far beyond no float.
FASTEST: Final = 1e9


class PassedPreflights:
    """Made before the loop begins: it reads the file. One that is broken, or none of ours, is moved aside with a warning
    and nothing is known. The methods belong to one thread, the loop's. Of many passes the newest 32 are kept."""

    def __init__(self, state_dir: Path | None) -> None:
        self._file = File(state_dir and state_dir / NAME)
        self._passed: dict[str, float | None] = self._file.read(_from_json) or {}

    def passed(self, key: str) -> bool:
        return key in self._passed

    def gib_per_s(self, key: str) -> float | None:
        return self._passed.get(key)

    def remember(self, key: str, gib_per_s: float | None) -> None:
        self._passed.pop(key, None)
        self._passed[key] = gib_per_s
        for oldest in list(self._passed)[:-MOST]:
            del self._passed[oldest]
        self._file.keep(_to_json(self._passed))

    def forget(self) -> None:
        self._passed.clear()
        self._file.keep(None)

    def close(self) -> None:
        self._file.close()


def _to_json(passed: dict[str, float | None]) -> str:
    rows = [{"key": key, "gib_per_s": gib_per_s} for key, gib_per_s in passed.items()]
    return json.dumps({"format": FORMAT, "passed": rows}, indent=1) + "\n"


def _from_json(text: str) -> dict[str, float | None]:
    """The inverse, the oldest first. Raises ValueError, whose text says in one line what is wrong."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    rows = found.get("passed")
    if not isinstance(rows, list):
        raise ValueError('it has no list "passed"')
    return dict(_row(row) for row in rows[-MOST:])


def _row(row: Any) -> tuple[str, float | None]:
    key, speed = (row.get("key"), row.get("gib_per_s")) if isinstance(row, dict) else (None, None)
    if not isinstance(key, str) or not 0 < len(key) <= LONGEST_KEY:
        raise ValueError('a pass has no "key"')
    if speed is None:
        return key, None
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 <= speed <= FASTEST:
        raise ValueError('a pass has no number "gib_per_s"')
    return key, float(speed)
