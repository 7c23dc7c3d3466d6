"""What the tests against the real vLLM share: a trial folder, a toy checkpoint, a free port."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.toy_setup import ENGINE_PYTHON, Setup, free_port, make_checkpoint


class MakeSetup(Protocol):
    def __call__(self, env: Mapping[str, str], args: tuple[str, ...], *, eager: bool = True) -> Setup: ...


@pytest.fixture
def make_setup(tmp_path: Path) -> MakeSetup:
    """Writes a config for the real vLLM with this environment and these further arguments."""
    assert ENGINE_PYTHON.exists(), "the engine's environment is missing; run: make dev"
    make_checkpoint()

    def make(env: Mapping[str, str], args: tuple[str, ...], *, eager: bool = True) -> Setup:
        setup = Setup(folder=tmp_path, port=free_port(), env=env, args=args, eager=eager)
        setup.write()
        return setup

    return make
