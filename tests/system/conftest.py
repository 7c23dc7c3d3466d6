"""The booted systemd that the tests of this directory share, one a module."""

from collections.abc import Iterator

import pytest

from tests.support.booted_systemd import BootedSystemd, booted_systemd


@pytest.fixture(scope="module")
def booted() -> Iterator[BootedSystemd]:
    """A fresh system for each test module: booting takes half a second, and what one module installs cannot help another."""
    with booted_systemd() as system:
        yield system
