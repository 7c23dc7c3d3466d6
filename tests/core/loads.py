"""Random loads: what may happen to an engine, drawn as plain moves and then told to a world as events."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mgpu_llm.core import recorded_policy, recording
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import Effect
from mgpu_llm.core.events import (
    EngineExited,
    Event,
    GpusSampled,
    GpusUnobserved,
    HostSampled,
    LinesDropped,
    ProcessesSampled,
    ProcessSample,
    StacksTaken,
)
from mgpu_llm.core.progress import LONGEST_LOOK_S, MOST_BIRTHS
from mgpu_llm.core.recording import Row
from mgpu_llm.core.signals import NOISE_FLOOR
from mgpu_llm.core.states import Killing, Starting
from tests.core.looks import stack, working
from tests.core.world import ASSIGNED, BANNER, COMPILE, NCCL, OUT_OF_MEMORY, UP, WORLD_SIZE, World, gpu, worker

#: The same examples each time, and so many of them.
# Nor is slow generation, on a machine that has other things to do, a failure.
few = settings(
    deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
many = settings(few, max_examples=60)
#: Times are multiples of this, so that they are exact in binary, in a recording's microseconds and in sums.
GRAIN_S: Final = 1 / 64
KNOWN: Final = (BANNER, WORLD_SIZE, NCCL, ASSIGNED, COMPILE)
SAID_BEFORE: Final = (
    "worker 7 waits",
    "(EngineCore pid=9) INFO 11-22 10:00:00 [shm_broadcast.py:1] No available shared memory broadcast block found in 60 s",
    "",
)


def seconds(shortest: float, longest: float) -> st.SearchStrategy[float]:
    return st.integers(int(shortest / GRAIN_S), int(longest / GRAIN_S)).map(lambda grains: grains * GRAIN_S)


@dataclass(frozen=True)
class Move:
    """`gap_s` after the last one: `what` happens, `amount` says how."""

    gap_s: float
    what: str
    amount: int = 0


#: In a quiet nothing moves, for long, seen by eyes that are quick or slow.
_QUIET: Final = ("sample",) * 4 + ("look",) * 2 + ("tick", "old-words", "gpus", "host")
_BUSY: Final = (
    "sample", "look", "known", "known", "new-words", "new-words", "grow", "birth", "gpus", "gpus-grow", "unobserved", "nobody",
    "dropped", "away", "host",
)  # fmt: skip


def _move(dice: Random, longest_gap_s: float, kinds: tuple[str, ...]) -> Move:
    return Move(dice.randint(1, int(longest_gap_s / GRAIN_S)) * GRAIN_S, dice.choice(kinds), dice.randint(0, 15))


def _load(seed: int) -> list[Move]:
    """Some movement and then a quiet, a few times. Dice and not strategies make it: hypothesis likes to repeat what it drew,
    and then a hundred loads are ten."""
    dice, moves = Random(seed), list[Move]()  # noqa: S311 - dice, not secrets
    for _ in range(dice.randint(1, 4)):
        moves += [_move(dice, 3.0, _BUSY) for _ in range(dice.randint(1, 6))]
        moves += [_move(dice, 1.0, ("failure",))] if dice.random() < 0.1 else []
        gap_s, lasts_s = dice.choice((0.25, 0.5, 1.0, LONGEST_LOOK_S, 3.0)), dice.uniform(2.0, 60.0)
        pattern = [_move(dice, gap_s, _QUIET) for _ in range(dice.randint(1, 4))] + [_move(dice, gap_s, ("sample",))]
        moves += pattern * (1 + int(lasts_s / sum(move.gap_s for move in pattern)))
    return moves


LOADS: Final = st.integers(0, 2**64 - 1).map(_load)


@dataclass
class Told(World):
    """A world that keeps the books on what is certain: when something moved, and the rows of a recording."""

    moved_at: float = 0.0
    rows: list[Row] = field(default_factory=list)
    grown: int = 0
    words: int = 0
    born: int = 0
    gpu_bytes: int = 2 << 30

    def send(self, event: Event) -> tuple[Effect, ...]:
        """As the daemon does: what comes while an engine loads belongs to its recording."""
        before = self.state
        effects = super().send(event)
        if isinstance(before, Starting):
            row = recording.to_row(event, before.since)
            self.rows += [row] if row is not None else []
            if not isinstance(self.state, Starting):
                t = event.at - before.since
                exited = isinstance(event, EngineExited)
                self.rows.append(recording.note(t, "exit", rc=event.status) if exited else recording.note(t, "stopping"))  # type: ignore[union-attr] # fmt: skip
        elif isinstance(self.state, Starting):
            self.rows = [recorded_policy.header(self.policy, self.state.run)]
            self.moved_at = event.at
        return effects

    def tell(self, moves: list[Move]) -> Told:
        """Until the moves are over, or the engine no longer loads."""
        for move in moves:
            if not isinstance(self.state, Starting):
                break
            self.at += move.gap_s
            self._make(move)
        return self

    def _make(self, move: Move) -> None:
        if move.what in ("known", "new-words", "old-words", "failure"):
            self._speak(move)
        elif move.what in ("sample", "grow", "birth", "nobody"):
            self._sample(move)
        elif move.what == "look":
            self._answer(move.amount)
        elif move.what == "away":
            self.at += 30.0
        elif move.what == "tick":
            self.tick(0.0)
        else:
            self._see(move)

    def _speak(self, move: Move) -> None:
        if move.what == "new-words":
            self.words += 1
            self.moved_at = self.at
            self.say("new " * self.words)
            return
        texts = {"known": (*KNOWN, UP), "old-words": SAID_BEFORE, "failure": (OUT_OF_MEMORY,)}[move.what]
        self.say(texts[move.amount % len(texts)])

    def _sample(self, move: Move) -> None:
        self.born += move.what == "birth"
        if move.what == "grow":
            self.grown += 1
        others = [worker(5000 + number, name=f"helper-{number}") for number in range(self.born)]
        now = () if move.what == "nobody" else (self._worker(), *others)
        assert isinstance(self.state, Starting)
        before, births = self.state.progress.processes, self.state.progress.births
        born = any((one.pid, one.started) not in before and births.get(one.name, 0) < MOST_BIRTHS for one in now)
        if born or (move.what == "grow" and before):
            self.moved_at = self.at
        self.send(ProcessesSampled(at=self.at, attempt=self.attempt, processes=now))

    def _worker(self) -> ProcessSample:
        step = {name: int(floor) * self.grown for name, floor in NOISE_FLOOR.items()}
        return worker(
            cpu_s=20.0 + self.at,
            rss_bytes=(1 << 30) + step["rss"],
            read_bytes=step["read_bytes"],
            written_bytes=None,
            major_faults=step["major_faults"],
            state="SDRT"[self.grown % 4],
        )

    def _answer(self, amount: int) -> None:
        """Whoever takes stacks answers, asked or not: an engine that stands still, works, or is not to be seen."""
        still = (stack(),)
        kinds = (
            still,
            still,
            still,
            still,
            (stack(), stack(9, state="D")),
            working(amount) or (),
            (),
            (stack(frames=()),),
        )
        unobserved = "no ptrace" if amount in (8, 15) else ""
        self.send(
            StacksTaken(at=self.at, attempt=self.attempt, stacks=kinds[amount % len(kinds)], unobserved=unobserved)
        )

    def _see(self, move: Move) -> None:
        match move.what:
            case "gpus" | "gpus-grow":
                if move.what == "gpus-grow" and isinstance(self.state, Starting) and self.state.progress.gpus:
                    self.moved_at = self.at
                self.gpu_bytes += 4 << 20 if move.what == "gpus-grow" else 0
                gpus = (replace(gpu(used_bytes=self.gpu_bytes), total_bytes=80 << 30), gpu("GPU-b"))
                self.send(GpusSampled(at=self.at, attempt=self.attempt, gpus=gpus))
            case "unobserved":
                self.send(GpusUnobserved(at=self.at, attempt=self.attempt, reason="NVML did not answer"))
            case "host":
                percent = (None, 0.0, 19.0, 21.0)[move.amount % 4]
                self.send(HostSampled(at=self.at, attempt=self.attempt, memory_percent=percent))
            case _:
                self.send(LinesDropped(at=self.at, attempt=self.attempt, count=move.amount))

    @property
    def verdict(self) -> Diagnosis | None:
        """What the load has failed of, None where it goes on."""
        return self.last_diagnosis if isinstance(self.state, Killing) else None
