"""The file of a recording while it is written."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)


class Tape:
    """Rows to a gzipped file, each rewritten on its way."""

    def __init__(self, path: Path, rewrites: Sequence[tuple[str, str]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = gzip.GzipFile(path, "wb", compresslevel=9)
        self._rewrites = rewrites

    def write(self, row: Mapping[str, object]) -> None:
        line = json.dumps(row, separators=(",", ":"))
        for old, new in self._rewrites:
            line = line.replace(old, new)
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def secrets(command: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """What must not be read in a recording, though the engine may print it: API keys and tokens."""
    keys = [after for before, after in itertools.pairwise(command) if before == "--api-key"]
    keys += [word.partition("=")[2] for word in command if word.startswith("--api-key=")]
    keys += [value for name, value in env.items() if SECRET.search(name)]
    return tuple(key for key in keys if len(key) >= 6)  # a shorter one is no secret, and replacing it would garble rows
