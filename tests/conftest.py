from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.fake_nvml import FakeNvml, build

# A shell starts what it puts into the background with Ctrl-C ignored, and so it would be for every program started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated driver's library, built once."""
    return build(tmp_path_factory.getbasetemp())


@pytest.fixture
def nvml(tmp_path: Path, library: Path) -> FakeNvml:
    """A host with the simulated driver."""
    return FakeNvml(tmp_path, library)
