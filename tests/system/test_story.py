"""The whole of it as an administrator has it: a unit of a real systemd, the real vLLM, systemctl and journalctl."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.booted_systemd import BootedSystemd
from tests.support.daemons import complete
from tests.support.toy_setup import CHECKPOINT, ENGINE_PYTHON, Setup, free_port, make_checkpoint
from tests.system.units import ctl, lay

pytestmark = [pytest.mark.system, pytest.mark.engine]
UNIT = "mgpu-llm.service"
START_S = 600


@pytest.fixture(scope="module")
def host(booted: BootedSystemd) -> BootedSystemd:
    return lay(booted)


def configure(host: BootedSystemd, setup: Setup) -> None:
    text = re.sub(r"^\[daemon\]\n.*\n.*\n", "", setup.toml(setup.runtime_dir), flags=re.MULTILINE)
    host.write("/etc/mgpu-llm/mgpu-llm.toml", text)


def test_systemctl_start_returns_once_the_stalled_load_was_cured_and_stop_leaves_nothing(
    host: BootedSystemd, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert ENGINE_PYTHON.exists(), "the engine's environment is missing; run: make dev"
    make_checkpoint()
    setup = Setup(folder=tmp_path_factory.mktemp("story"), port=free_port(), env={"MGPU_FAULT": "p2p-hang"})
    configure(host, setup)

    started = host.run("systemctl", "start", "mgpu-llm", timeout_s=START_S)
    assert started.returncode == 0, started.stderr + host.journal("mgpu-llm")
    assert complete(setup.url)
    shown = host.show(UNIT, "ActiveState", "SubState", "StatusText", "ControlGroup", "NRestarts")
    assert (shown["ActiveState"], shown["SubState"], shown["NRestarts"]) == ("active", "running", "0")
    assert shown["StatusText"].startswith("ready, degraded: rung p2p-off")
    status = json.loads(ctl(host, "status", "--json"))
    assert (status["state"], status["degraded"], status["rung"], status["attempt"]) == ("ready", True, "p2p-off", 2)
    engine = f"/sys/fs/cgroup{shown['ControlGroup']}/engine-2/cgroup.procs"
    assert len(host.must("cat", engine).split()) >= 4
    assert host.run("test", "-e", f"/sys/fs/cgroup{shown['ControlGroup']}/engine-1").returncode != 0

    journal = host.journal("mgpu-llm", "-p", "notice", "-o", "cat")
    story = [line.split()[0] for line in journal.splitlines() if re.match(r"(engine|daemon)\.\w", line)]
    wanted = [
        "daemon.started",
        "engine.starting",
        "engine.stalled",
        "engine.starting",
        "engine.ready",
        "engine.degraded",
    ]
    assert [name for name in story if name in wanted] == wanted
    assert "stalled in distributed-init: nothing moved for" in journal
    assert any("stand in _spin_for_ever" in seen for seen in status["attempts"][0]["evidence"]), "py-spy may look"

    assert host.run("systemctl", "stop", "mgpu-llm", timeout_s=120).returncode == 0
    after = host.show(UNIT, "ActiveState", "Result")
    assert (after["ActiveState"], after["Result"]) == ("inactive", "success")
    assert host.run("pgrep", "-u", "mgpu-llm").stdout == ""
    assert host.must("ls", "/dev/shm") == ""


def test_a_hopeless_config_fails_at_once_and_systemctl_status_gives_the_reason(host: BootedSystemd) -> None:
    config = (
        f'[model]\npath = "{CHECKPOINT}"\n[engine]\npython = "{ENGINE_PYTHON}"\nprot = 8000\n[gpus]\nuse = "none"\n'
    )
    host.write("/etc/mgpu-llm/mgpu-llm.toml", config)
    assert host.run("systemctl", "start", "mgpu-llm", timeout_s=START_S).returncode != 0
    shown = host.show(UNIT, "ActiveState", "Result", "ExecMainStatus")
    assert (shown["ActiveState"], shown["Result"], shown["ExecMainStatus"]) == ("failed", "exit-code", "78")
    told = host.run("systemctl", "status", "mgpu-llm").stdout
    assert "engine.prot: found an unknown key" in told
    host.must("systemctl", "reset-failed", "mgpu-llm")
