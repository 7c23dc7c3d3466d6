"""What a remedy is looked for against: the attempts that failed in a row, and what the ladder has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.ladder import Ladder, Rung
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import Want


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt that failed: on which rung, and why."""

    rung: Rung
    found: Diagnosis


@dataclass(frozen=True, kw_only=True)
class Case:
    """`want` is what is wanted after the last of `failures`, oldest first."""

    want: Want
    ladder: Ladder
    failures: Sequence[Failure]

    @property
    def rung(self) -> Rung:
        return self.failures[-1].rung

    @property
    def found(self) -> Diagnosis:
        return self.failures[-1].found

    @property
    def launch(self) -> Launch:
        return self.ladder.launch(self.rung)

    @property
    def guessed(self) -> bool:
        """Whether something else is left to be tried after it."""
        return self.found.wants[-1] is not self.want
