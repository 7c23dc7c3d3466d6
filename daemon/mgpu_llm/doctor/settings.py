"""The config's own problems, as `mgpud --check` has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from mgpu_llm.config import checks
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import render
from mgpu_llm.doctor.finding import Finding, Subject

SUBJECT: Final = Subject("config")


def check(loaded: Loaded, environ: Mapping[str, str], gpu_count: int | None) -> Iterator[Finding]:
    """`environ` is what the engine inherits. Starts the engine's Python once, 20 s at most.
    Who has the port is told elsewhere."""
    problems = checks.check(loaded, environ, gpu_count=gpu_count, engine_runs=True)
    for problem in problems:
        yield SUBJECT.problem("config", render([replace(problem, hint="")]), problem.hint)
    if not problems:
        yield SUBJECT.ok("config", f"{loaded.main}: no problems")
