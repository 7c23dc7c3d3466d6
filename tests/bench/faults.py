"""What is done to an engine in the middle of its start, when it prints a certain line."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

_FORM: Final = re.compile(
    r"(?P<what>sigstop-for:(?P<pause>\d+(?:\.\d+)?)|sigstop|sigkill|run):(?P<object>[^@]+)@(?P<line>.+)"
)
FORMS: Final = """\
  sigstop:NAME@LINE        stop the first process whose name or command line matches NAME
  sigstop-for:S:NAME@LINE  the same, and let it go on after S seconds
  sigkill:NAME@LINE        kill it
  run:COMMAND@LINE         run a shell command"""


class Fault:
    """One fault, done once: when a line matches LINE. NAME and LINE are regular expressions.

    `spec` is in one of FORMS; raises ValueError for any other.
    """

    def __init__(self, spec: str) -> None:
        form = _FORM.fullmatch(spec)
        if form is None:
            raise ValueError(f"cannot do the fault '{spec}': it is in none of the forms\n{FORMS}")
        self._what = form["what"].partition(":")[0]
        self._object = form["object"]
        self._line = re.compile(form["line"])
        self._pause_s = float(form["pause"]) if form["pause"] else None
        self._due = True

    def is_due(self, line: str) -> bool:
        """True for the first line that matches, and never again."""
        if self._due and self._line.search(line):
            self._due = False
            return True
        return False

    async def do(self, pids: Callable[[], tuple[int, ...]], note: Callable[..., None]) -> None:
        """Do it to one of the engine's processes, `pids()`, and tell `note` what was done."""
        if self._what == "run":
            note("fault", fault="run", command=self._object)
            await (await asyncio.create_subprocess_shell(self._object)).wait()
            return
        pid, name = next(((pid, name) for pid in pids() if re.search(self._object, name := _name(pid))), (0, ""))
        if not pid:
            note("fault", fault=self._what, failed=f"no process is called '{self._object}'")
            return
        os.kill(pid, signal.SIGKILL if self._what == "sigkill" else signal.SIGSTOP)
        note("fault", fault=self._what, pid=pid, name=name)
        if self._pause_s is not None:
            await asyncio.sleep(self._pause_s)
            os.kill(pid, signal.SIGCONT)
            note("fault", fault="sigcont", pid=pid, name=name)


def _name(pid: int) -> str:
    """Its name and command line: vLLM's workers differ in the latter alone, a name has 15 characters."""
    folder = Path("/proc", str(pid))
    try:
        return (
            f"{(folder / 'comm').read_text().strip()} {(folder / 'cmdline').read_text().replace(chr(0), ' ').strip()}"
        )
    except OSError:
        return ""
