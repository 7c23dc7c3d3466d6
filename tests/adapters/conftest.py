from __future__ import annotations

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from tests.support.fake_nvml import FakeNvml
from tests.support.fake_nvml.asked import Asked, asking


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    """What was logged so far, whichever thread did."""
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def asked(nvml: FakeNvml) -> Iterator[Asked]:
    """The GPU adapter on that host, in a process of its own."""
    with asking(nvml.environment()) as asked:
        yield asked
