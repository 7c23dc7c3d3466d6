"""The config's own problems, as `mgpud --check` has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from mgpu_llm.config import checks
from mgpu_llm.config.fitting import fitting
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import render
from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject

SUBJECT: Final = Subject("config")


def check(
    loaded: Loaded, environ: Mapping[str, str], gpu_bytes: Sequence[int] | None, who: Account | None = None
) -> Iterator[Finding]:
    """`environ` is what the engine inherits; `gpu_bytes` what each GPU of the config has, None where nobody tells of them. Starts
    the engine's Python once, 20 s at most, as `who` if that is somebody else. Who has the port is told elsewhere, and which files
    of weights are broken."""
    count = None if gpu_bytes is None else len(gpu_bytes)
    other = None if who is None else account.other(who)
    run_as = None if other is None else (other.uid, other.gid, other.groups)
    fitted = fitting(loaded.config, environ, gpu_bytes or ()) if loaded.complete else None
    problems = checks.check(
        loaded, environ, gpu_count=count, fitted=fitted, engine_runs=True, weights=False, run_as=run_as
    )
    for problem in problems:
        yield SUBJECT.problem("config", render([replace(problem, hint="")]), problem.hint)
    if not problems:
        yield SUBJECT.ok("config", f"{loaded.main}: no problems")
