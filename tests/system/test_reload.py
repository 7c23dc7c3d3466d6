"""systemctl reload: a changed config holds as far as it can, and one that is wrong changes nothing and fails the reload."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.support.booted_systemd import BootedSystemd
from tests.support.fake_setup import MODEL, FakeSetup
from tests.support.toy_setup import free_port
from tests.system.units import lay

pytestmark = pytest.mark.system
#: The usual unit, and an instance, whose socket lies elsewhere; each with its config.
CONFIGS: Final = {"mgpu-llm": "mgpu-llm", "mgpu-llm@two": "two"}
#: What the units say themselves.
OF_THE_UNIT: Final = ("daemon.runtime_dir", "daemon.state_dir", "gpus.lock_dirs")


class Host:
    """Both units, each with a port of its own."""

    def __init__(self, booted: BootedSystemd) -> None:
        self.booted = booted
        self.ports = {unit: free_port() for unit in CONFIGS}

    def configure(self, unit: str, settings: Mapping[str, object]) -> None:
        own = {**dict.fromkeys(OF_THE_UNIT), **settings}
        setup = FakeSetup(folder=Path("/srv"), port=self.ports[unit], settings=own)
        self.booted.write(f"/etc/mgpu-llm/{CONFIGS[unit]}.toml", setup.toml())

    def reload(self, unit: str) -> int:
        return self.booted.run("systemctl", "reload", unit).returncode

    def told(self, unit: str, event: str) -> str:
        """What the daemon has said last of an event."""
        return self.booted.journal(unit, f"MGPU_EVENT={event}", "-o", "cat").splitlines()[-1]

    def shown(self, unit: str) -> tuple[str, str, str]:
        shown = self.booted.show(f"{unit}.service", "MainPID", "ActiveState", "SubState")
        return shown["MainPID"], shown["ActiveState"], shown["SubState"]


@pytest.fixture(scope="module")
def host(booted: BootedSystemd) -> Iterator[Host]:
    booted.write("/srv/model/config.json", json.dumps(MODEL))
    lay(booted)
    found = Host(booted)
    for unit in CONFIGS:
        found.configure(unit, {})
    booted.must("systemctl", "start", *CONFIGS)
    yield found
    booted.must("systemctl", "stop", *CONFIGS)


@pytest.mark.parametrize("unit", CONFIGS)
def test_a_good_config_is_applied_by_the_same_daemon_and_the_journal_says_what_waits(host: Host, unit: str) -> None:
    before = host.shown(unit)
    host.configure(unit, {"patience.weights": 77, "engine.args": ["--enforce-eager"]})
    assert host.reload(unit) == 0
    told = host.told(unit, "config.reloaded")
    assert "applied=patience.weights needs_restart=engine.args" in told
    said = host.booted.journal(unit, "-o", "cat")
    assert f"needs a restart: engine.args; do it with: systemctl restart {unit}\n" in said
    assert host.shown(unit) == before
    assert before[1:] == ("active", "running")


@pytest.mark.parametrize("unit", CONFIGS)
def test_a_wrong_config_fails_the_reload_and_the_service_goes_on(host: Host, unit: str) -> None:
    before = host.shown(unit)
    host.configure(unit, {"patience.weights": -1, "engine.prot": 8000})
    assert host.reload(unit) != 0
    told = host.told(unit, "config.reload-failed")
    assert "patience.weights: found -1 (integer)" in told
    assert "engine.prot: found an unknown key" in told
    assert host.shown(unit) == before
    host.configure(unit, {})
    assert host.reload(unit) == 0
