"""The config read again while the daemon runs: checked as a whole, and what of it can hold at once."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

from mgpu_llm.adapters import journal
from mgpu_llm.adapters.control_socket import RefusedError, WrongConfigError
from mgpu_llm.adapters.engine.aside import answered
from mgpu_llm.adapters.health import Probes
from mgpu_llm.assembly import settled
from mgpu_llm.config import checks, parse
from mgpu_llm.config.endpoint import listening
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import render
from mgpu_llm.config.reloading import Change, change
from mgpu_llm.config.schema import Config
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.states import Policy

#: A disk that does not answer must not keep who asked for ever; whoever asks over the socket is hung up on after 10 s.
CHECK_S: Final = 8.0


class Reloading:
    """`loaded` is the config that the daemon began with, `environ` what the engine inherits, and `gpu_count` how many GPUs it
    uses, None where it uses none. All methods belong to the loop."""

    def __init__(self, loaded: Loaded, environ: Mapping[str, str], gpu_count: int | None, probes: Probes) -> None:
        self._main = loaded.main
        self._running = loaded.config
        self._environ = environ
        self._gpu_count = gpu_count
        self._probes = probes

    async def read(self) -> Config:
        """The config as it is in the files now. Raises WrongConfigError with every problem, and RefusedError."""
        running = self._running
        try:
            loaded, problems = await answered(lambda: self._checked(running), CHECK_S)
        except TimeoutError:
            why = f"the config could not be checked within {CHECK_S:g} s; see: mgpud --check"
            raise RefusedError(f"cannot reload: {why}") from None
        if problems:
            raise WrongConfigError(problems)
        return loaded.config

    def apply(self, wanted: Config, policy: Policy, in_use: Set[Area]) -> tuple[Policy, Change]:
        """Let hold what can: the policy from now on, and what has come of each change. `in_use` are the areas that the settings
        now in use have changed."""
        done = change(self._running, wanted, in_use)
        self._running = now = done.config
        journal.tell_from(now.daemon.log_level)
        serving = now.serving
        self._probes.allow(
            health_timeout_s=serving.probe_timeout,
            completion_timeout_s=serving.completion_timeout,
        )
        return settled(policy, now), done

    def _checked(self, running: Config) -> tuple[Loaded, list[str]]:
        """As mgpud --check does, but for what only the driver knows. The engine's port is its own, and whether the files of
        weights are whole is asked of another model only."""
        loaded = parse.load(self._main)
        wanted = loaded.config
        found = checks.check(
            loaded,
            self._environ,
            gpu_count=self._gpu_count if wanted.gpus == running.gpus else None,
            engine_runs=listening(wanted) == listening(running),
            weights=wanted.model != running.model,
        )
        return loaded, render(found).splitlines()
