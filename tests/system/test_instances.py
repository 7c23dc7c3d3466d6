"""Several models on one host: mgpu-llm@NAME, each with a config and folders of its own, on GPUs of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.booted_systemd import BootedSystemd
from tests.support.fake_nvml import FakeGpu, FakeNvml, build
from tests.support.fake_setup import MODEL, FakeSetup
from tests.support.toy_setup import free_port
from tests.system.units import PROGRAMS, ctl, lay, wait_for

pytestmark = pytest.mark.system
LIBRARY = "/usr/local/lib/fake-nvml"
CONTROL = "/srv/nvml-control"
TOKEN = "hf_sesame0123456789"
#: What an instance takes from its name.
FROM_ITS_NAME = ("daemon.runtime_dir", "daemon.state_dir", "gpus.lock_dirs", "gpus.tensor_parallel")


@pytest.fixture(scope="module")
def host(booted: BootedSystemd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedSystemd]:
    """Two GPUs of a simulated driver, and the instances a and b on one each."""
    folder = tmp_path_factory.mktemp("driver")
    nvml = FakeNvml(folder, build(tmp_path_factory.getbasetemp()))
    nvml.set([FakeGpu()] * 2)
    shutil.copytree(nvml.environment()["LD_LIBRARY_PATH"], booted.root / LIBRARY[1:])
    booted.write(CONTROL, (folder / "nvml-control").read_text())
    booted.write("/srv/model/config.json", json.dumps(MODEL))
    driver = f"[Service]\nEnvironment=LD_LIBRARY_PATH={LIBRARY} FAKE_NVML_CONTROL={CONTROL}\n"
    booted.write("/etc/systemd/system/mgpu-llm@.service.d/driver.conf", driver)
    booted.write("/etc/mgpu-llm/hf-token", f"{TOKEN}\n", mode=0o600)
    secret = "[Service]\nLoadCredential=env.HF_TOKEN:/etc/mgpu-llm/hf-token\n"
    booted.write("/etc/systemd/system/mgpu-llm@a.service.d/secret.conf", secret)
    lay(booted)
    for name, gpu in (("a", 0), ("b-2.5", 1)):
        configure(booted, name, gpu)
        booted.must("systemctl", "start", f"mgpu-llm@{name}")
    yield booted
    booted.must("systemctl", "stop", "mgpu-llm@*")


def configure(host: BootedSystemd, name: str, gpu: int) -> None:
    settings = {"gpus.use": [gpu], "model.served_name": name, **dict.fromkeys(FROM_ITS_NAME)}
    setup = FakeSetup(folder=Path("/srv"), port=free_port(), settings=settings)
    host.write(f"/etc/mgpu-llm/{name}.toml", setup.toml())


def state(host: BootedSystemd, name: str) -> str:
    return host.show(f"mgpu-llm@{name}.service", "ActiveState")["ActiveState"]


def test_two_instances_serve_beside_each_other_and_mgpuctl_names_both(host: BootedSystemd) -> None:
    assert [state(host, name) for name in ("a", "b-2.5")] == ["active", "active"]
    listed = ctl(host).splitlines()
    assert [line.split()[:2] for line in listed[1:3]] == [["mgpu-llm@a", "ready"], ["mgpu-llm@b-2.5", "ready"]]
    told = json.loads(ctl(host, "-i", "b-2.5", "status", "--json"))
    assert (told["state"], told["model"]) == ("ready", "b-2.5")
    owners = host.must("stat", "-c", "%U %a %n", "/run/mgpu-llm@a", "/var/lib/mgpu-llm@b-2.5").splitlines()
    assert owners == ["mgpu-llm 750 /run/mgpu-llm@a", "mgpu-llm 750 /var/lib/mgpu-llm@b-2.5"]
    assert host.run("test", "-e", "/run/mgpu-llm").returncode != 0, "that is the usual one's"


def test_a_secret_of_root_s_is_in_the_environment_of_the_engine_that_was_given_it_and_nowhere_else(
    host: BootedSystemd,
) -> None:
    pids = [json.loads(ctl(host, "-i", name, "status", "--json"))["pid"] for name in ("a", "b-2.5")]
    environments = [host.must("cat", f"/proc/{pid}/environ").split("\0") for pid in pids]
    assert [f"HF_TOKEN={TOKEN}" in environment for environment in environments] == [True, False]
    daemon = host.show("mgpu-llm@a.service", "MainPID")["MainPID"]
    shown = [host.must("cat", f"/proc/{pid}/cmdline") for pid in (pids[0], daemon)]
    shown += [host.must("cat", f"/proc/{daemon}/environ"), host.journal("mgpu-llm@a", "-o", "json", "--all")]
    shown += [
        ctl(host, "-i", "a", *words) for words in (("status", "--json"), ("plan", "--json"), ("logs",), ("attempts",))
    ]
    shown += [host.must("sh", "-c", "cat $(find /run/mgpu-llm@a /var/lib/mgpu-llm@a -type f)")]
    assert [text for text in shown if "sesame" in text] == []
    assert host.run(
        "setpriv", "--reuid=mgpu-llm", "--regid=mgpu-llm", "--clear-groups", "cat", "/etc/mgpu-llm/hf-token"
    ).returncode


def test_a_third_one_on_a_gpu_of_the_first_says_whose_it_is_waits_and_begins_when_that_ends(
    host: BootedSystemd,
) -> None:
    configure(host, "c", 0)
    host.must("systemctl", "start", "--no-block", "mgpu-llm@c")
    waits = "waiting: cannot reserve GPU 0 ("
    wait_for(lambda: host.show("mgpu-llm@c.service", "StatusText")["StatusText"].startswith(waits))
    assert host.show("mgpu-llm@c.service", "ActiveState", "NRestarts") == {
        "ActiveState": "activating",
        "NRestarts": "0",
    }
    pid = host.show("mgpu-llm@a.service", "MainPID")["MainPID"]
    assert f"another mgpud uses it (pid {pid}, " in host.journal("mgpu-llm@c")
    assert [state(host, name) for name in ("a", "b-2.5")] == ["active", "active"]
    host.must("systemctl", "stop", "mgpu-llm@a")
    wait_for(lambda: state(host, "c") == "active")
    host.must("systemctl", "stop", "mgpu-llm@c")
    host.must("systemctl", "start", "mgpu-llm@a")


def test_the_end_of_one_takes_nothing_from_the_other(host: BootedSystemd) -> None:
    host.must("systemctl", "stop", "mgpu-llm@a")
    assert host.run("test", "-e", "/run/mgpu-llm@a").returncode != 0
    assert json.loads(ctl(host, "-i", "b-2.5", "status", "--json"))["state"] == "ready"
    assert ctl(host).splitlines()[1].split()[:3] == ["mgpu-llm@a", "not", "running"]
    host.must("systemctl", "start", "mgpu-llm@a")
    assert state(host, "a") == "active"


def test_members_of_the_group_may_look_admins_may_change_things_and_others_are_told_what_to_do(
    host: BootedSystemd,
) -> None:
    def asked(user: str, *words: str) -> tuple[int, str]:
        as_user = ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups")
        done = host.run(*as_user, str(PROGRAMS / "mgpuctl"), "-i", "b-2.5", *words)
        return done.returncode, done.stdout + done.stderr

    for user, groups in (("eve", ""), ("bob", "mgpu-llm"), ("ann", "mgpu-llm,mgpu-llm-admin")):
        host.must("useradd", "--user-group", f"--groups={groups}", user)
    status, said = asked("eve", "status")
    assert (status, "usermod -aG mgpu-llm USER" in said) == (4, True)
    assert asked("bob", "status")[0] == 0
    status, said = asked("bob", "restart")
    assert (status, "not allowed to restart: that is for root and for members of the group mgpu-llm-admin" in said) == (
        4,
        True,
    )
    assert asked("ann", "restart", "--wait")[0] == 0
    assert "(ann), pid " in host.journal("mgpu-llm@b-2.5")
