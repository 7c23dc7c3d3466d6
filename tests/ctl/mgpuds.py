"""A mgpud for mgpuctl to run, where no daemon answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mgpu_llm.ctl import main as main_module
from mgpu_llm.ctl import mgpud as mgpud_module


class Mgpud:
    """Stands in for mgpud: keeps its arguments, prints, and exits as told. The call itself is that of mgpuctl's `verb`, in this
    process; without a `socket` no daemon answers it."""

    def __init__(self, verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._verb = verb
        self._folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(main_module, "_drop_stdout", lambda: None)

    def prints(self, text: str, *, complaint: str = "", status: int = 0, more: str = "") -> None:
        script = self._folder / "mgpud.py"
        script.write_text(
            f"import json, pathlib, sys, time\n"
            f"pathlib.Path({str(self._folder / 'asked')!r}).write_text(json.dumps(sys.argv[1:]))\n"
            f"print({text!r})\nprint({complaint!r}, end='', file=sys.stderr)\n{more}\nsys.exit({status})\n"
        )
        self._monkeypatch.setattr(mgpud_module, "MGPUD", (sys.executable, str(script)))

    def is_given(self, seconds: float) -> None:
        self._monkeypatch.setattr(mgpud_module, "MGPUD_S", seconds)

    @property
    def asked(self) -> list[str]:
        return [str(word) for word in json.loads((self._folder / "asked").read_text())]

    def ctl(self, *words: str, socket: Path | None = None) -> int:
        argv = ["mgpuctl", "--socket", str(socket or self._folder / "none"), self._verb, *words]
        self._monkeypatch.setattr(sys, "argv", argv)
        return main_module.main()
