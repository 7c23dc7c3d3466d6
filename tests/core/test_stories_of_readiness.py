"""What it takes until an engine counts as serving, and what must not count."""

from __future__ import annotations

import pytest

from mgpu_llm.core.effects import (
    NotifyReady,
    ProbeCompletion,
    ProbeHealth,
)
from mgpu_llm.core.events import CompletionProbed, HealthProbed, LineRead, StartRequested
from mgpu_llm.core.states import Starting
from tests.core.world import (
    ASSIGNED,
    BANNER,
    COMPILE,
    NCCL,
    UP,
    WORLD_SIZE,
    World,
    loading,
    of,
)


def test_ready_comes_only_after_a_completion() -> None:
    world = loading().say(UP)
    assert len(world.all(ProbeHealth)) == 1
    effects = world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200"))
    assert effects == (ProbeCompletion(attempt=1),)
    assert world.all(NotifyReady) == []
    assert of(world.tick(5.0), ProbeCompletion) == [], "one probe at a time"
    world.send(CompletionProbed(at=world.at, attempt=1, served=True, detail="200"))
    assert world.all(NotifyReady) == [NotifyReady()]


def test_a_server_that_says_it_is_up_is_probed_at_once() -> None:
    world = loading()
    world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="refused"))
    effects = world.send(LineRead(at=world.at, attempt=1, text=UP))
    assert of(effects, ProbeHealth) == [ProbeHealth(attempt=1)]
    again = world.send(LineRead(at=world.at, attempt=1, text="INFO:     Uvicorn running on http://0.0.0.0:8000"))
    assert of(again, ProbeHealth) == []


def asked(world: World, seconds: float = 10.0) -> int:
    """How many probes of either kind are asked for meanwhile; each is answered as by a server that is healthy."""
    count = 0
    for _ in range(int(seconds / 0.5)):
        effects = world.tick()
        if of(effects, ProbeHealth):
            count += 1
            effects = world.send(HealthProbed(at=world.at, attempt=world.attempt, healthy=True, detail="200"))
        if of(effects, ProbeCompletion):
            count += 1
            world.send(CompletionProbed(at=world.at, attempt=world.attempt, served=True, detail="200"))
    return count


@pytest.mark.parametrize(
    "known",
    [(BANNER,), (BANNER, WORLD_SIZE, NCCL), (BANNER, ASSIGNED), (BANNER, COMPILE)],
    ids=["boot", "distributed-init", "weights", "compile"],
)
def test_a_foreign_server_on_the_port_gives_no_ready_before_the_engine_could_serve(known: tuple[str, ...]) -> None:
    world = World().start().say(*known)
    assert asked(world) == 0
    assert isinstance(world.state, Starting)
    assert world.all(NotifyReady) == []
    world.say("INFO 11-22 10:22:00 [api_server.py:1] Starting vLLM server on http://127.0.0.1:8000")
    assert asked(world) == 2
    assert world.all(NotifyReady) == [NotifyReady()]


def test_answers_to_a_probe_of_before_the_first_known_words_prove_nothing_after_them() -> None:
    world = World().start()
    assert of(world.tick(), ProbeHealth) == [ProbeHealth(attempt=1)]
    world.say(BANNER)
    assert world.send(HealthProbed(at=world.at, attempt=1, healthy=True, detail="200")) == ()
    for hopeless in (False, True):
        world.send(CompletionProbed(at=world.at, attempt=1, served=not hopeless, detail="x", hopeless=hopeless))
    assert isinstance(world.state, Starting)
    assert world.all(NotifyReady) == []


def test_an_engine_whose_log_says_nothing_known_is_asked_all_along() -> None:
    world = World().start().say("another engine", "is booting")
    assert asked(world) == 2
    assert world.all(NotifyReady) == [NotifyReady()]


def test_the_first_known_words_end_the_asking_until_the_api() -> None:
    world = World().start()
    assert of(world.tick(), ProbeHealth) == [ProbeHealth(attempt=1)]
    world.send(HealthProbed(at=world.at, attempt=1, healthy=False, detail="refused"))
    world.say(BANNER)
    assert asked(world) == 0
    world.say(UP)
    assert len(world.all(ProbeHealth)) == 2


def test_an_engine_without_a_process_is_not_probed() -> None:
    world = World()
    world.send(StartRequested(at=world.at))
    assert of(world.tick(5.0), ProbeHealth) == []
    assert of(world.spawn().tick(0.5), ProbeHealth) == [ProbeHealth(attempt=1)]
