"""What a unit's sandbox closes: as systemd 252 shows such units, and as their services then saw the places."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.config import parse as config
from mgpu_llm.doctor import account, disks, sandbox
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.examination import examine
from mgpu_llm.doctor.facts import Patient
from mgpu_llm.doctor.finding import Finding
from mgpu_llm.doctor.sandbox import Sandbox, View
from mgpu_llm.doctor.system import System
from mgpu_llm.doctor.unit import parse
from tests.doctor.hosts import levels, named

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
LOADED = "LoadState=loaded\nUser=mgpu-llm\n"
#: Shown of a unit with drop-ins, its own and ours.
STRICT = """\
ReadWritePaths=-/run/lock /srv/rw "/srv/with blank" /home/u/w /tmp/rw
PrivateTmp=yes
ProtectHome=read-only
ProtectSystem=strict
RuntimeDirectory=sbx
StateDirectory=sbx
CacheDirectory=sbx
LogsDirectory=
BindPaths=/srv/ro:/srv/bound:rbind -/tmp/bound:/tmp/bound:rbind
BindReadOnlyPaths=/tmp/boundro:/tmp/boundro:rbind
"""
FULL = """\
ReadWritePaths=/home/u/w
PrivateTmp=no
ProtectHome=yes
ProtectSystem=full
BindPaths=/home/b
BindPaths=/home/c:/home/c
"""
OPEN = 'ReadWritePaths="\nPrivateTmp=no\nProtectHome=no\nProtectSystem=no\n'
SERVICE = Account(name="mgpu-llm", uid=998, gid=998, groups=(998,), home="/var/lib/mgpu-llm")
NAME = "mgpu-llm@small"
EDIT = f"sudo systemctl edit {NAME}: "


def of(shown: str) -> Sandbox:
    unit = parse(LOADED + shown, NAME)
    assert unit is not None
    assert unit.name == NAME
    return unit.sandbox


def checked(shown: str, writes: Mapping[str, str], reads: Mapping[str, str] | None = None) -> list[Finding]:
    return list(sandbox.check(of(shown), NAME, writes, reads or {}, SERVICE))


def loaded(folder: Path, text: str) -> config.Loaded:
    file = folder / "mgpu-llm.toml"
    file.write_text(f'model.path = "{folder}/model"\ndaemon.runtime_dir = "/run/mgpu-llm"\n{text}')
    return config.load(file)


@pytest.mark.parametrize(
    ("shown", "views"),
    [
        (
            STRICT,
            {
                View.READ: "/ /usr /etc /run /var/lib /home/u /root /srv/ro /srv/rwx /tmp/boundro/a",
                View.WRITTEN: "/dev/shm /run/lock /run/sbx /var/lib/sbx/a /var/cache/sbx /home/u/w /srv/rw /srv/bound /tmp/bound",
                View.OWN: "/tmp /tmp/model /var/tmp /tmp/rw",
            },
        ),
        (
            FULL,
            {
                View.READ: "/usr /usr/local /etc /boot",
                View.WRITTEN: "/ /usrx /run /var/lib /srv /tmp /home/b /home/c/d",
                View.HIDDEN: "/home /home/u/w /root /run/user/1000",
            },
        ),
        (OPEN, {View.WRITTEN: "/ /usr /etc /home/u /tmp"}),
        ("", {View.WRITTEN: "/ /usr /etc /home/u /tmp"}),
    ],
)
def test_a_place_is_seen_as_the_longest_of_the_units_settings_above_it_says(shown: str, views: dict[View, str]) -> None:
    expected = {place: view for view, places in views.items() for place in places.split()}
    assert {place: of(shown).view(place) for place in expected} == expected
    assert shown is not STRICT or of(shown).view("/srv/with blank/a") is View.WRITTEN


def test_what_the_unit_leaves_open_is_well() -> None:
    found = checked(STRICT, {"HF_HOME": "/srv/rw/hf", "TMPDIR": "/tmp"}, {"the model": "/srv/model"})
    assert levels(found) == {"unit-write": "ok", "unit-read": "ok"}
    assert named(found, "unit-write").seen == f"{NAME} leaves all 2 places writable"


def test_a_place_that_the_unit_makes_read_only_is_told_with_the_setting_that_opens_it_and_what_is_below_goes_with_it(
    tmp_path: Path,
) -> None:
    hidden = FULL.replace("ProtectSystem=full", "ProtectSystem=strict")
    there, missing = str(tmp_path), "/data/no-such folder"
    first, second = checked(hidden, {"HF_HUB_CACHE": f"{there}/hub", "HF_HOME": there, sandbox.STATE: missing})
    assert (first.name, first.level, first.fix) == (
        "unit-write",
        "warning",
        f"sudo install -d -o mgpu-llm '{missing}'; {EDIT}ReadWritePaths=\"{missing}\" under [Service]",
    )
    assert first.seen.startswith(
        f"{missing} (daemon.state_dir) is to be written, and the unit {NAME} makes it read-only"
    )
    assert (second.level, second.fix) == ("warning", f"{EDIT}ReadWritePaths={there} under [Service]")
    assert f"{there} (HF_HOME, HF_HUB_CACHE) " in second.seen
    (home,) = checked(hidden, {"HF_HOME": "/home/nobody-has-this/hf"})
    assert home.fix.endswith(f"; {EDIT}ProtectHome=read-only, ReadWritePaths=/home/nobody-has-this/hf under [Service]")


def test_without_the_folder_of_its_socket_the_daemon_cannot_start() -> None:
    (problem,) = checked(STRICT, {sandbox.RUNTIME: "/run/other"})
    assert (problem.level, "/run/other" in problem.fix) == ("problem", True)


def test_what_is_kept_in_the_units_own_tmp_is_kept_until_it_stops_and_seen_by_nobody_else() -> None:
    state, cache = checked(STRICT, {sandbox.STATE: "/tmp/state", "HF_HOME": "/var/tmp/hf", "TMPDIR": "/tmp"})
    assert (state.level, cache.level) == ("warning", "warning")
    assert (state.name, state.fix) == ("unit-write", "set daemon.state_dir to a place outside of /tmp and /var/tmp")
    assert "goes at each stop" in cache.seen


def test_what_the_unit_does_not_see_is_told_with_what_shows_it() -> None:
    reads = {"the model": "/tmp/model", "the engine": "/home/u/venv/bin/python", sandbox.CONFIG: "/tmp/a b.toml"}
    _, model, config_file = checked(STRICT, {}, reads)
    assert (model.name, model.level, config_file.level) == ("unit-read", "problem", "warning")
    assert f"{EDIT}BindReadOnlyPaths=/tmp/model under [Service]" in model.fix
    assert '="/tmp/a b.toml" ' in config_file.fix
    _, engine = checked(FULL, {}, reads)
    assert (engine.level, engine.fix) == ("problem", f"{EDIT}ProtectHome=read-only under [Service]")


def test_a_link_is_unseen_where_it_lies_and_where_it_leads(tmp_path: Path) -> None:
    hides = f"PrivateTmp=yes\nBindReadOnlyPaths={tmp_path}/seen\n"
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "link").symlink_to("/tmp/model")
    (tmp_path / "link").symlink_to("/usr/bin")
    for name in ("seen/link", "link") if tmp_path.is_relative_to("/tmp") else ("seen/link",):
        assert checked(hides, {}, {"the model": str(tmp_path / name)})[-1].level == "problem"
    assert levels(checked(hides, {}, {"the model": f"{tmp_path}/seen"}))["unit-read"] == "ok"


def test_folders_that_systemd_makes_for_the_user_need_not_be_there_before_the_first_start(tmp_path: Path) -> None:
    made = of(STRICT).made
    assert made == ("/var/lib/sbx", "/var/cache/sbx", "/run/sbx")
    environ = {"HOME": "/var/lib/sbx", "XDG_CACHE_HOME": "/var/cache/sbx", "TMPDIR": str(tmp_path)}
    me = account.account("root" if os.geteuid() == 0 else None)
    found = list(disks.check(System(), environ, "/var/lib/sbx", me, made))
    assert named(found, "disks-write").seen == f"{me.name} may write in all 7 places, by their permissions"


@as_root
def test_other_folders_are_asked_for_all_the_same() -> None:
    nobody, made = account.account("nobody"), ("/var/lib/sbx",)
    environ = {"HOME": "/var/lib/sbx", "HF_HOME": "/var/lib/sbx2/hf", "TMPDIR": "/tmp"}
    problem = named(list(disks.check(System(), environ, "/var/lib/sbx", nobody, made)), "disks-write")
    assert (problem.level, "(HF_HOME: /var/lib/sbx2/hf)" in problem.seen) == ("problem", True)


@pytest.mark.parametrize(
    "option",
    [
        ["--profiler-config.torch_profiler_dir", "/data/traces"],
        ["--profiler-config.torch_profiler_dir=/data/traces"],
        ["--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/data/traces"}'],
    ],
)
def test_places_of_the_configs_own_are_to_be_written_too(tmp_path: Path, option: list[str]) -> None:
    args = [*option, "--download-dir", "/models", "--uds", "/srv/api/socket"]
    found = sandbox.writes(loaded(tmp_path, f"engine.args = {args}\n"), {"HOME": "/h"}, "/state")
    own = {"torch_profiler_dir": "/data/traces", "--download-dir": "/models", "--uds": "/srv/api"}
    own |= {sandbox.STATE: "/state", sandbox.RUNTIME: "/run/mgpu-llm", "HF_HOME": "/h/.cache/huggingface"}
    assert own.items() <= found.items()


def test_what_the_config_does_not_name_is_not_to_be_written(tmp_path: Path) -> None:
    environ = {"HOME": "/h", "VLLM_TORCH_PROFILER_DIR": "/traces"}
    for found in (sandbox.writes(loaded(tmp_path, ""), environ, "/state"), sandbox.writes(None, environ, "/state")):
        assert found["VLLM_TORCH_PROFILER_DIR"] == "/traces"
        assert not {"--download-dir", "--uds", "torch_profiler_dir", "VLLM_CONFIG_ROOT"} & found.keys()


def test_model_engine_and_config_are_to_be_seen_and_a_model_of_the_hub_lies_in_a_cache(tmp_path: Path) -> None:
    own = loaded(tmp_path, "")
    seen = {"the model": f"{tmp_path}/model", "the engine": "/opt/vllm/bin/python", "the config": str(own.main)}
    assert sandbox.reads(own, "/opt/vllm/bin/python") == seen
    own.main.write_text('model.path = "org/model"\n')
    assert sandbox.reads(config.load(own.main), "") == {"the config": str(own.main)}


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A systemctl that shows this of every unit, and writes down what it was asked."""

    def showing(shown: str) -> Path:
        (tmp_path / "bin").mkdir()
        program, asked = tmp_path / "bin" / "systemctl", tmp_path / "asked"
        (tmp_path / "shown").write_text(shown)
        program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexec cat {tmp_path}/shown\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        return asked

    return showing


def examined(file: Path) -> list[Finding]:
    who = account.account("root") if os.geteuid() == 0 else account.account(None)
    return asyncio.run(examine(Patient(loaded=config.load(file), who=who, environ=os.environ), Gpus()))


def test_the_unit_of_an_instance_is_asked_and_named_in_what_to_do(systemctl: Callable[[str], Path]) -> None:
    me = account.account("root" if os.geteuid() == 0 else None).name
    limits = f"LoadState=loaded\nUser={me}\nLimitNOFILE=2048\nTasksMax=100\nMemoryMax=1073741824\n"
    asked = systemctl(f"{limits}ProtectSystem=strict\nEnvironment=HF_HOME=/usr/hf\n")
    found = examined(Path("/etc/mgpu-llm/no-such-instance.toml"))
    unit = "mgpu-llm@no-such-instance"
    assert asked.read_text().startswith(f"show {unit}.service --property=LoadState ")
    assert {f"--property={name}" for name in sandbox.PROPERTIES} <= set(asked.read_text().split())
    for name in ("limits-files", "limits-tasks"):
        assert named(found, name).fix.startswith(f"sudo systemctl edit {unit}: ")
    assert named(found, "memory-limit").fix.startswith(f"sudo systemctl set-property {unit} MemoryMax=infinity")
    closed = [finding for finding in found if finding.name == "unit-write" and "HF_HOME" in finding.seen]
    assert [finding.fix.rpartition("; ")[2] for finding in closed] == [
        f"sudo systemctl edit {unit}: ReadWritePaths=/usr/hf under [Service]"
    ]


def test_any_other_config_is_the_usual_units_and_of_another_users_sandbox_nothing_is_said(
    tmp_path: Path, systemctl: Callable[[str], Path]
) -> None:
    asked = systemctl("LoadState=loaded\nUser=nobody-of-this-name\nProtectSystem=strict\n")
    file = tmp_path / "other.toml"
    file.write_text(f'model.path = "{tmp_path}"\nengine.python = "{sys.executable}"\ngpus.use = "none"\n')
    found = examined(file)
    assert asked.read_text().startswith("show mgpu-llm.service ")
    assert not [finding for finding in found if finding.name.startswith("unit-")]
