"""What the tests of the whole daemon share: a way to begin a life, and a simulated NVIDIA driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.daemon.lives import Life, living
from tests.support.fake_setup import FakeSetup


class Begin(Protocol):
    def __call__(
        self,
        scenario: str = "",
        settings: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        tables: str = "",
    ) -> Life: ...


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Begins daemons, each in a folder of its own; all are ended with the test."""
    with ExitStack() as stack:
        yield beginner(lambda number: tmp_path / str(number), stack)


@pytest.fixture(scope="module")
def begin_for_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    """The same for daemons that begin with the module and run side by side: most of a life is waiting."""
    with ExitStack() as stack:
        yield beginner(lambda number: tmp_path_factory.mktemp(f"life{number}"), stack)


def beginner(folder: Callable[[int], Path], stack: ExitStack) -> Begin:
    lives = list[Life]()

    def begin(
        scenario: str = "",
        settings: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        tables: str = "",
    ) -> Life:
        place = folder(len(lives))
        place.mkdir(exist_ok=True)
        setup = FakeSetup(folder=place, scenario=scenario, settings=settings or {}, tables=tables)
        lives.append(stack.enter_context(living(setup, environ)))
        return lives[-1]

    return begin
