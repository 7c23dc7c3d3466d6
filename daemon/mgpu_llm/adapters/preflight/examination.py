"""The order of the questions, and when an answer may be given. Every doubt ends in "not found out"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.adapters.preflight import answer, rounds
from mgpu_llm.adapters.preflight.answer import Copies
from mgpu_llm.adapters.preflight.program import Message, Program
from mgpu_llm.adapters.preflight.trial import ON_ONE_GPU, Trial
from mgpu_llm.core.preflight import AS_LAUNCHED, Checked

#: No transport is called so: names of rungs have no blanks.
COPIES: Final = "copies between GPUs"
POLL_S: Final = 0.1
#: A pass of ours that took longer says that the host stood still, not that the GPUs did.
LONGEST_PASS_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds, each from the moment when all ranks of a transport were ready.

    After `others_s` the alternatives are begun, which costs nothing but their work. A transport hangs, once another has
    passed, when it has had `floor_s`, `more_s` for each GPU beyond two, `times` what the other took, and `grace_s` since that
    passed; the alternatives, which began together and under the same load, `other_floor_s` and `other_times`. Where none has
    passed, it is `hopeless_s`. Two healthy H100s need one or two; eight GPUs, and NCCL's NVLink multicast, have more to set up.
    """

    others_s: float = 3.0
    floor_s: float = 7.0
    other_floor_s: float = 4.0
    more_s: float = 1.0
    times: float = 4.0
    other_times: float = 2.0
    grace_s: float = 1.5
    hopeless_s: float = 30.0
    settled_s: float = 1.0
    measured_s: float = 5.0
    killed_s: float = 3.0
    copies_s: float = 3.0
    pairs_s: float = 12.0


class OverError(Exception):
    """There is nothing more to learn; the text says why."""


class Examination:
    """Made for one probe and used once. `entries` are the GPUs as they are called; `clock` gives monotonic seconds."""

    def __init__(
        self,
        program: Program,
        *,
        entries: Sequence[str],
        transports: Mapping[str, Mapping[str, str]],
        environment: Mapping[str, str],
        folder: Path,
        until: float,
        clock: Callable[[], float],
        patience: Patience,
    ) -> None:
        self._program = program
        self.entries = tuple(entries)
        self._others = {name: variables for name, variables in transports.items() if name != AS_LAUNCHED}
        self._direct = environment.get("NCCL_P2P_DISABLE") != "1"
        self._folder = folder
        self._until_at = until
        self._clock = clock
        self.patience = patience
        self._seen_at = clock()
        self.now = 0.0
        self._loaded = False
        self._trials: dict[str, Trial] = {}
        self.copies = Copies()

    async def run(self) -> Checked:
        """Raises nothing; `took_s` is left to the caller."""
        try:
            await self.learn(lambda: self._loaded)
            own = self.start(AS_LAUNCHED, range(len(self.entries)), alone=True)
            if len(self.entries) == 1:
                await self.learn(lambda: own.alone() or own.failed(self.now))
                return answer.of_gpus(own, self.entries)
            return await self._between(own)
        except OverError as over:
            return answer.of_nothing(str(over), self._trials.get(AS_LAUNCHED), self.entries)

    async def _between(self, own: Trial) -> Checked:
        await self.learn(lambda: own.settled(self.now) or own.ready_at is not None)
        if self._direct and own.ready_at is not None:
            # Not before: a GPU that takes one process only (nvidia-smi -c EXCLUSIVE_PROCESS) is for the rank.
            self._tell(COPIES, own.devices, role="copies")
        others_s = self.patience.others_s + self.patience.more_s * max(0, len(own.devices) - 2) / 2
        await self.learn(lambda: own.settled(self.now) or self._age(own) >= others_s)
        if own.failed(self.now) and not own.broken():
            return answer.of_gpus(own, self.entries)
        others = []
        if not own.passed:
            others = [self.start(name, own.devices, env=variables) for name, variables in self._others.items()]
        if own.failed(self.now):
            self.kill([own])
        trials = [own, *others]
        try:
            await self.learn(lambda: self._decided(trials))
        except OverError:
            if not own.failed(self.now):
                raise
        if own.failed(self.now) and not own.broken():
            return answer.of_gpus(own, self.entries)
        return await self._told(trials)

    async def _told(self, trials: Sequence[Trial]) -> Checked:
        """Everything that is known now, and what is worth another moment."""
        own, best = trials[0], next((trial for trial in trials if trial.passed), None)
        hung = {trial.name: self._age(trial) for trial in trials if self._hung(trial, trials)}
        nccl: Mapping[tuple[str, str], str] = {}
        try:
            if best is not None:
                await self._measure(best, trials)
                if own.passed:
                    since = self.now
                    await self.learn(
                        lambda: not self._direct or self.copies.done or self.now - since >= self.patience.copies_s
                    )
                elif len(self.entries) > 2:
                    self.kill([best])
                    nccl = await rounds.pairs(self, best.took_s)
        except OverError:
            pass
        # Only now: the launch's own may have passed at the last moment, and then a copy that takes long is only slow.
        copies = self.copies.found(self.entries, self.now, late=best is not None and not own.passed)
        return answer.of_all(trials, best, hung, {**nccl, **copies})

    async def _measure(self, best: Trial, trials: Iterable[Trial]) -> None:
        """With the GPUs for itself: what hangs on them takes half of their time."""
        await self.buried([trial for trial in trials if trial is not best])
        self._program.tell({"measure": best.name})
        since = self.now
        await self.learn(
            lambda: (
                len(best.gib_per_s) + len(best.failures) >= len(best.devices)
                or self.now - since >= self.patience.measured_s
            )
        )

    def _decided(self, trials: Sequence[Trial]) -> bool:
        """Whether what is known will do: everything that is gentler than the first one to pass has had its chance."""
        if trials[0].passed:
            return True
        first = next((at for at, trial in enumerate(trials) if trial.passed), len(trials))
        passed = trials[first] if first < len(trials) else None
        return all(
            trial.settled(self.now)
            or self._hung(trial, trials)
            or (trial is not trials[0] and self._late(trial, passed))
            for trial in trials[:first]
        )

    def _hung(self, trial: Trial, trials: Iterable[Trial]) -> bool:
        if not trial.waits():
            return False
        passed = [other for other in trials if other.passed_at is not None]
        if not passed:
            return self._age(trial) >= self.patience.hopeless_s
        took_s = min(other.took_s for other in passed)
        own = trial.name == AS_LAUNCHED
        floor_s, times = (
            (self.patience.floor_s, self.patience.times)
            if own
            else (self.patience.other_floor_s, self.patience.other_times)
        )
        return self.overdue(trial, took_s, floor_s, times) and (
            self.now - min(other.passed_at or 0.0 for other in passed) >= max(self.patience.grace_s, took_s)
        )

    def overdue(self, trial: Trial, took_s: float, floor_s: float, times: float) -> bool:
        """Whether it has had much longer than `took_s`, which is what another needed."""
        floor_s += self.patience.more_s * max(0, len(trial.devices) - 2)
        return self._age(trial) >= max(floor_s, times * took_s)

    def _late(self, trial: Trial, passed: Trial | None) -> bool:
        """Not even ready, long after another that began with it has passed: of no use, whyever that is."""
        if trial.ready_at is not None or passed is None or passed.passed_at is None:
            return False
        needed_s = passed.passed_at - passed.begun_at
        return self.now - passed.passed_at >= max(2 * self.patience.grace_s, needed_s)

    def _age(self, trial: Trial) -> float:
        return 0.0 if trial.ready_at is None else self.now - trial.ready_at

    def start(
        self, name: str, devices: Sequence[int], *, alone: bool = False, env: Mapping[str, str] | None = None
    ) -> Trial:
        self._tell(name, devices, role="ranks", alone=alone, env=dict(env or {}))
        self._trials[name] = Trial(
            name=name, devices=tuple(devices), begun_at=self.now, settled_s=self.patience.settled_s
        )
        return self._trials[name]

    def _tell(self, name: str, devices: Sequence[int], **more: object) -> None:
        meet = str(self._folder / str(len(self._trials)))
        self._program.tell({"start": name, "devices": list(devices), "meet": meet, "env": {}, **more})

    def kill(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            self._program.tell({"kill": trial.name})

    async def buried(self, trials: Sequence[Trial]) -> None:
        """Kill them, and wait a moment until they are gone from the GPUs."""
        self.kill(trials)
        since = self.now
        await self.learn(lambda: all(each.killed for each in trials) or self.now - since >= self.patience.killed_s)

    async def learn(self, true: Callable[[], bool]) -> None:
        """Listen until it is so. Raises OverError where nobody speaks any more, or the time is over."""
        while not true():
            if self._clock() >= self._until_at:
                raise OverError(self._unfinished())
            said, ended = await self._program.messages(POLL_S)
            seen_at = self._clock()
            self.now += min(seen_at - self._seen_at, LONGEST_PASS_S)
            self._seen_at = seen_at
            for message in said:
                self._hear(message)
            if ended and not said and not true():
                raise OverError(self._last_words())

    def _hear(self, message: Message) -> None:
        if message.get("is") == "loaded":
            self._loaded = True
        elif message.get("is") == "unusable":
            raise OverError(str(message.get("why")))
        elif message.get("group") == COPIES:
            self.copies.hear(message, self.now)
        elif (trial := self._trials.get(str(message.get("group")))) is not None:
            trial.hear(message, self.now)

    def _unfinished(self) -> str:
        own = self._trials.get(AS_LAUNCHED)
        if own is None:
            return "PyTorch was not loaded in time"
        for rank in range(len(own.devices)):
            stage = own.stages.get(rank, "")
            if stage in ("", *ON_ONE_GPU):
                return f"GPU {self.entries[rank]} was not {'ready' if stage else 'reached'} in time"
        return "the GPUs had not got through to each other when the time was over"

    def _last_words(self) -> str:
        words = [line for line in self._program.words if line.strip()]
        return "the probe ended" + (f": {words[-1].strip()[:300]}" if words else "")
