"""What the tests against the real vLLM share: a trial folder, a toy checkpoint, a free port."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.toy_setup import ENGINE_PYTHON, Setup, free_port, make_checkpoint

MakeSetup = Callable[[Mapping[str, str], tuple[str, ...]], Setup]


@pytest.fixture
def make_setup(tmp_path: Path) -> MakeSetup:
    """Writes a config for the real vLLM with this environment and these further arguments."""
    assert ENGINE_PYTHON.exists(), "the engine's environment is missing; run: make dev"
    make_checkpoint()

    def make(env: Mapping[str, str], args: tuple[str, ...]) -> Setup:
        setup = Setup(folder=tmp_path, port=free_port(), env=env, args=args)
        setup.write()
        return setup

    return make
