"""mgpuctl's exit codes, as `mgpuctl --help` lists them."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
ON_ITS_WAY: Final = 1
WRONG_COMMAND: Final = 2
NO_RECORDING: Final = 2
NO_DAEMON: Final = 3
NOT_ALLOWED: Final = 4
NO_ANSWER: Final = 5
#: Of doctor.
WARNINGS: Final = 1
PROBLEMS: Final = 2
STOPPED: Final = 6
FAILED: Final = 7
REFUSED: Final = 8
FAULT: Final = 70
INTERRUPTED: Final = 130
READER_LEFT: Final = 141


def of_state(state: str) -> int:
    """What `mgpuctl status` ends with: 0 only if the model is served, 6 and 7 if it will not come by itself."""
    return {"ready": DONE, "stopped": STOPPED, "failed": FAILED}.get(state, ON_ITS_WAY)
