"""Questions that mgpud answers by itself, without a daemon: one run of it, one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import click

from mgpu_llm.ctl import exits
from mgpu_llm.ctl.client import Failure
from mgpu_llm.ctl.words import plain

#: mgpud itself, of this same installation; -P, because Python would look into the current folder first.
MGPUD: Final = (sys.executable, "-P", "-m", "mgpu_llm")
#: It checks the whole config, and asks the NVIDIA driver, which may take long.
MGPUD_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """`words` is what follows mgpud on its command line, "--plan" or another option first; `doing` is what somebody wants to do
    who asks that, as in "cannot plan". `limit_s` is how long mgpud may take, None for MGPUD_S."""

    words: tuple[str, ...]
    doing: str
    limit_s: float | None = None

    def run(self) -> subprocess.CompletedProcess[str]:
        """mgpud, when it has ended. Raises Failure where it does not end or cannot be run."""
        limit_s = MGPUD_S if self.limit_s is None else self.limit_s
        try:
            return subprocess.run(
                [*MGPUD, *self.words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="backslashreplace",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise self._failure(f"{self._asked} has not ended within {limit_s:g} s", exits.NO_ANSWER) from error
        except OSError as error:
            raise self._failure(f"cannot run {MGPUD[0]}: {error.strerror}", exits.REFUSED) from error

    def document(self, done: subprocess.CompletedProcess[str], statuses: Collection[int] = (0,)) -> dict[str, Any]:
        """What it printed, once its remarks are passed on to stderr. Raises Failure where its exit status is not one of
        `statuses`, or it printed something else."""
        for line in done.stderr.splitlines():
            click.echo(plain(line), err=True)
        if done.returncode not in statuses:
            raise self._failure(f"{self._asked} ended with exit status {done.returncode}", exits.REFUSED)
        try:
            return dict(json.loads(done.stdout))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._failure(f"{self._asked} printed no JSON document", exits.NO_ANSWER) from error

    @property
    def _asked(self) -> str:
        return f"mgpud {self.words[0]}"

    def _failure(self, why: str, code: int) -> Failure:
        return Failure(f"cannot {self.doing}: {why}", code)
