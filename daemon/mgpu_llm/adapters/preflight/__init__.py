"""Whether GPUs can do what an engine will ask of them, found out before it does: one alone, then pairs, then all over NCCL.

A program of ours is run by the engine's own Python (`probe.py`); NCCL that hangs there is killed with it, and no engine has
to be loaded, watched and ended to learn that.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from mgpu_llm.adapters.preflight import program
from mgpu_llm.adapters.preflight.carried_out import carried_out
from mgpu_llm.adapters.preflight.examination import Examination, Patience
from mgpu_llm.core.preflight import AS_LAUNCHED, OF_NCCL, Checked, Transport
from mgpu_llm.core.redaction import Redactor, secrets_of

__all__ = ("Memory", "Patience", "Preflight")

#: What of the environment decides how NCCL gets through. Which GPUs are visible is told by their UUIDs.
COUNT: Final = (*OF_NCCL, "LD_LIBRARY_PATH", "LD_PRELOAD")
COUNT_NOT: Final = ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")


class Memory(Protocol):
    """What has passed, by a key that says of what; see adapters/memory/preflight.py."""

    def passed(self, key: str) -> bool: ...

    def gib_per_s(self, key: str) -> float | None: ...

    def remember(self, key: str, gib_per_s: float | None) -> None: ...

    def forget(self) -> None: ...


class Preflight:
    """`python` begins the command of the engine's own Python, () where nobody knows it. `key` is what a pass depends on beside
    GPUs and transport: boot, driver, versions. `clock` gives monotonic seconds; a check takes `deadline_s` at most, and
    its end."""

    def __init__(
        self,
        *,
        python: Sequence[str],
        memory: Memory | None,
        key: Mapping[str, str],
        deadline_s: float,
        clock: Callable[[], float],
        patience: Patience | None = None,
    ) -> None:
        self._python = tuple(python)
        self._memory = memory
        self._key = dict(key)
        self._deadline_s = deadline_s
        self._clock = clock
        self._patience = patience or Patience()

    async def check(
        self,
        gpus: Mapping[str, str],
        environment: Mapping[str, str],
        transports: Mapping[str, Mapping[str, str]],
    ) -> Checked:
        """`gpus` are entries of CUDA_VISIBLE_DEVICES with their UUIDs, in the order of the ranks; `environment` is the
        engine's, whole and marked as such; `transports` are variables to be laid over it by name, core.preflight.AS_LAUNCHED
        among them, from gentle to certain.

        Raises nothing but CancelledError. However it ends, no process of it is left then; one that outlives SIGKILL is named.
        """
        began = self._clock()
        keys = {name: self._key_of(gpus, {**environment, **variables}) for name, variables in transports.items()}
        own = keys.get(AS_LAUNCHED, "")
        if self._memory is not None and self._memory.passed(own):
            transport = Transport(name=AS_LAUNCHED, works=True, gib_per_s=self._memory.gib_per_s(own))
            return Checked(transports=(transport,) if len(gpus) > 1 else (), remembered=True)
        if not gpus or not self._python:
            return Checked(unobserved="the engine's Python is not known" if gpus else "there is no GPU to check")
        checked = await self._check(tuple(gpus), {**environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}, transports)
        self._remember(checked, keys)
        return replace(checked, took_s=self._clock() - began)

    def forget(self) -> None:
        """What has passed before has to be tried again."""
        if self._memory is not None:
            self._memory.forget()

    async def _check(
        self, entries: tuple[str, ...], environment: Mapping[str, str], transports: Mapping[str, Mapping[str, str]]
    ) -> Checked:
        until = self._clock() + self._deadline_s
        try:
            with tempfile.TemporaryDirectory(prefix="mgpu-llm-preflight-", ignore_cleanup_errors=True) as folder:
                probe = await program.begin(self._python, environment)
                try:
                    checked = await Examination(
                        probe,
                        entries=entries,
                        transports=transports,
                        environment=environment,
                        folder=Path(folder),
                        until=until,
                        clock=self._clock,
                        patience=self._patience,
                    ).run()
                finally:
                    stuck = await carried_out(probe.end())
        except (OSError, ValueError, RuntimeError) as error:
            why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            return Checked(unobserved=f"cannot run '{self._python[0]}': {why}")
        return _with_stuck(_redacted(checked, Redactor(secrets_of(environment, ()))), stuck)

    def _remember(self, checked: Checked, keys: Mapping[str, str]) -> None:
        if self._memory is None or checked.unobserved or checked.gpus:
            return
        if not checked.transports and AS_LAUNCHED in keys:
            self._memory.remember(keys[AS_LAUNCHED], None)
        for transport in checked.transports:
            if transport.works and (transport.name != AS_LAUNCHED or not checked.pairs):
                self._memory.remember(keys[transport.name], transport.gib_per_s)

    def _key_of(self, gpus: Mapping[str, str], environment: Mapping[str, str]) -> str:
        counts = {
            name: value for name, value in environment.items() if name.startswith(COUNT) and name not in COUNT_NOT
        }
        parts = [self._key, list(gpus.values()), counts, self._python]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _redacted(checked: Checked, redactor: Redactor) -> Checked:
    """What others have said may hold secrets."""
    return replace(
        checked,
        transports=tuple(replace(each, detail=redactor.text(each.detail)) for each in checked.transports),
        gpus={gpu: redactor.text(why) for gpu, why in checked.gpus.items()},
        pairs={pair: redactor.text(why) for pair, why in checked.pairs.items()},
        unobserved=redactor.text(checked.unobserved),
    )


def _with_stuck(checked: Checked, stuck: Sequence[str]) -> Checked:
    """What could not be ended is told where it will be read."""
    if not stuck:
        return checked
    remark = f"{', '.join(stuck)} of the preflight outlives SIGKILL"
    if checked.unobserved or not checked.transports:
        return replace(checked, unobserved="; ".join(filter(None, (checked.unobserved, remark))))
    own, *others = checked.transports
    return replace(checked, transports=(replace(own, detail="; ".join(filter(None, (own.detail, remark)))), *others))
