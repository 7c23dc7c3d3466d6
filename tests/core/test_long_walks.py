"""Thousands of dice-driven steps through worlds that answer plausibly or lie; the rules must hold at every one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from mgpu_llm.core.effects import NotifyReady, SpawnEngine
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineEvent,
    EngineExited,
    EngineGone,
    EngineSpawned,
    EngineSpawnFailed,
    EngineStuck,
    Event,
    GpusSampled,
    GpusUnobserved,
    HealthProbed,
    HostSampled,
    LineRead,
    LinesDropped,
    ProcessesSampled,
    Request,
    StacksTaken,
    StartRequested,
    Ticked,
)
from mgpu_llm.core.states import (
    LONGEST_HISTORY,
    Backoff,
    Killing,
    Ready,
    Starting,
    Stopped,
    Terminating,
)
from tests.core.everything import EVENTS, check
from tests.core.looks import stack, still, unanswered, working
from tests.core.world import (
    BAD_FLAG,
    BANNER,
    NCCL,
    NOT_FREE,
    ON_CPU,
    OUT_OF_MEMORY,
    UP,
    WORLD_SIZE,
    World,
    gpu,
    policy,
    worker,
)

CHATTER = "(EngineCore pid=9) INFO 11-22 10:00:00 [shm_broadcast.py:1] No available shared memory broadcast block found in 60 s"
WORDS = (BANNER, WORLD_SIZE, NCCL, UP, OUT_OF_MEMORY, NOT_FREE, CHATTER, "", "RuntimeError: something else", BAD_FLAG)


class Walk:
    """A world driven by dice. It owes an answer to every SpawnEngine, KillEngine and probe, and gives it late, wrongly
    or, where `adversarial`, mixed with lies about other attempts and requests at any time."""

    def __init__(self, seed: int, *, adversarial: bool) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - dice, not secrets
        self.adversarial = adversarial
        self.kills_answered = 0
        self.most_tries = 0
        self.most_deaths = 0
        self.daemons = 1
        self.begin()

    def begin(self) -> None:
        launch = self.dice.choice((None, ON_CPU))
        self.world = World(
            policy=policy(attempts=self.dice.randint(1, 9)) if launch is None else policy(launch, attempts=4),
            stacks=self.dice.choice((still, working, unanswered)),
            stacks_unobserved=self.dice.choice(("", "", "ptrace is not allowed")),
        )
        self.spawns_seen = 0
        self.tries = 0
        self.send(StartRequested(at=self.world.at))

    def send(self, event: Event) -> None:
        world = self.world
        before = world.state
        effects = world.send(event)
        if isinstance(event, Request) or any(isinstance(effect, NotifyReady) for effect in effects):
            self.tries = 0
        self.tries += sum(isinstance(effect, SpawnEngine) for effect in effects)
        self.most_tries = max(self.most_tries, self.tries)
        assert self.tries <= world.policy.attempts, "more attempts than allowed without ever serving"
        assert len(world.state.run.ended) <= LONGEST_HISTORY
        assert 0 <= world.state.run.deaths <= world.policy.deaths
        if isinstance(world.state, Starting | Ready | Backoff):
            assert world.state.run.deaths < world.policy.deaths, "goes on although it died too often"
        self.most_deaths = max(self.most_deaths, world.state.run.deaths)
        check(before, event, world.state, effects)
        answered = isinstance(event, EngineGone | EngineStuck) and event.attempt == world.attempt
        if isinstance(before, Killing) and answered:
            assert not isinstance(world.state, Killing), "a kill that is done leads on"
            self.kills_answered += 1

    def go(self, steps: int) -> None:
        for _ in range(steps):
            if self.world.exit is not None:
                self.daemons += 1
                self.begin()
            self.world.at += self.dice.choice((0.0, 0.1, 0.5, 0.5, 2.0, 30.0))
            self.send(self.event())

    def event(self) -> Event:
        dice, world = self.dice, self.world
        if self.adversarial and dice.random() < 0.15:
            lie = dice.choice(EVENTS)
            if isinstance(lie, EngineEvent):
                lie = replace(lie, attempt=dice.choice((world.attempt - 1, world.attempt + 1, 0)))
            return replace(lie, at=world.at)
        return self.answer()

    def answer(self) -> Event:
        dice, state, at, attempt = self.dice, self.world.state, self.world.at, self.world.attempt
        tick = Ticked(at=at)
        match state:
            case Stopped():
                return StartRequested(at=at)
            case Starting(pid=None) if dice.random() < 0.5:
                if dice.random() < 0.2:
                    return EngineSpawnFailed(at=at, attempt=attempt, reason="no fork", hopeless=dice.random() < 0.1)
                return EngineSpawned(at=at, attempt=attempt, pid=dice.randint(2, 99999))
            case Killing() if dice.random() < 0.5:
                if dice.random() < 0.05:
                    return EngineStuck(at=at, attempt=attempt, holders=("pid 71",))
                return EngineGone(at=at, attempt=attempt)
            case Starting() | Ready() | Terminating():
                return self.engine_event(at, attempt)
            case _:
                return tick

    def engine_event(self, at: float, attempt: int) -> Event:
        dice = self.dice
        choice: list[tuple[float, Any]] = [
            (30, lambda: Ticked(at=at)),
            (
                20,
                lambda: ProcessesSampled(
                    at=at, attempt=attempt, processes=(worker(rss_bytes=dice.randint(1, 3) << 30),)
                ),
            ),
            (5, lambda: GpusSampled(at=at, attempt=attempt, gpus=(gpu(used_bytes=dice.randint(0, 9) << 30),))),
            (1, lambda: GpusUnobserved(at=at, attempt=attempt, reason="NVML did not answer")),
            (15, lambda: LineRead(at=at, attempt=attempt, text=dice.choice(WORDS))),
            (2, lambda: HostSampled(at=at, attempt=attempt, memory_percent=dice.choice((None, 0.0, 80.0)))),
            (
                2,
                lambda: StacksTaken(
                    at=at,
                    attempt=attempt,
                    stacks=dice.choice(((), (stack(),), (stack(1027, "step (x.py:1)"), stack(8, state="D")))),
                    unobserved=dice.choice(("", "", "py-spy is not installed")),
                ),
            ),
            (2, lambda: LinesDropped(at=at, attempt=attempt, count=3)),
            (3, lambda: EngineExited(at=at, attempt=attempt, status=dice.choice((0, 1, -9)))),
            (8, lambda: HealthProbed(at=at, attempt=attempt, healthy=dice.random() < 0.5, detail="")),
            (
                4,
                lambda: CompletionProbed(
                    at=at, attempt=attempt, served=dice.random() < 0.7, detail="", hopeless=dice.random() < 0.05
                ),
            ),
        ]
        weights, makers = zip(*choice, strict=True)
        event: Event = dice.choices(makers, weights)[0]()
        return event


@pytest.mark.parametrize("seed", range(4))
def test_a_long_walk_through_a_plausible_world_never_breaks_a_rule(seed: int) -> None:
    walk = Walk(seed, adversarial=False)
    walk.go(1000)
    assert walk.kills_answered > 10
    assert walk.daemons > 1
    assert walk.most_deaths > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_long_walk_through_a_world_that_lies_never_breaks_a_rule(seed: int) -> None:
    walk = Walk(seed, adversarial=True)
    walk.go(1000)
    assert walk.kills_answered > 10
    assert walk.daemons > 1
    assert walk.most_deaths > 0


def test_a_daemon_that_serves_and_dies_for_ever_remembers_a_bounded_past() -> None:
    world = World(policy=policy(deaths_window_s=1.0)).start()
    for _ in range(LONGEST_HISTORY + 25):
        world.serve().at += 1.0
        world.exits(0).gone().wait_out_backoff()
    assert len(world.state.run.ended) == LONGEST_HISTORY
    assert world.state.run.deaths == 1
    assert world.rung == "base"
    assert world.attempt == LONGEST_HISTORY + 26
