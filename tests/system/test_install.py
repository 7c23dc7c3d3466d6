"""packaging/install: what it puts where, that it works there, and that it takes all of it away again."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.booted_systemd import CHECKOUT, BootedSystemd, booted_systemd

pytestmark = pytest.mark.system

VENV = "usr/local/lib/mgpu-llm/venv"
TREE = [
    "etc/mgpu-llm/conf.d",
    "etc/mgpu-llm/mgpu-llm.toml",
    "usr/local/bin/mgpuctl",
    "usr/local/bin/mgpud",
    VENV,
    "usr/local/lib/systemd/catalog/mgpu-llm.catalog",
    "usr/local/lib/systemd/system/mgpu-llm-devices.service",
    "usr/local/lib/systemd/system/mgpu-llm.service",
    "usr/local/lib/systemd/system/mgpu-llm@.service",
    "usr/local/lib/sysusers.d/mgpu-llm.conf",
    "usr/local/lib/tmpfiles.d/mgpu-llm.conf",
    "usr/local/share/bash-completion/completions/mgpuctl",
    "usr/local/share/bash-completion/completions/mgpud",
    "usr/local/share/fish/vendor_completions.d/mgpuctl.fish",
    "usr/local/share/fish/vendor_completions.d/mgpud.fish",
    "usr/local/share/man/man1/mgpuctl.1",
    "usr/local/share/man/man5/mgpu-llm.toml.5",
    "usr/local/share/man/man8/mgpu-llm.service.8",
    "usr/local/share/man/man8/mgpu-llm@.service.8",
    "usr/local/share/man/man8/mgpud.8",
    "usr/local/share/mgpu-llm/grafana/mgpu-llm.json",
    "usr/local/share/mgpu-llm/mgpu-llm.schema.json",
    "usr/local/share/mgpu-llm/prometheus/mgpu-llm.rules.yml",
    "usr/local/share/mgpu-llm/prometheus/scrape.example.yml",
    "usr/local/share/zsh/site-functions/_mgpuctl",
    "usr/local/share/zsh/site-functions/_mgpud",
]
# An install as small as one can be: it tries what does not depend on what is installed.
SMALL_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "mgpu-llm"
version = "1"
[project.scripts]
mgpud = "mgpu_llm.__main__:main"
mgpuctl = "mgpu_llm.__main__:main"
[tool.setuptools.packages.find]
where = ["daemon"]
"""
SMALL_SHARE = """
import pathlib, sys
file = pathlib.Path(sys.argv[-1], "man/man1/mgpuctl.1")
file.parent.mkdir(parents=True)
file.touch()
"""


def packaging_install(
    verb: str, destdir: Path, checkout: Path = CHECKOUT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "packaging/install", verb],
        env={**os.environ, "DESTDIR": str(destdir), **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stamps(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}


def tree(root: Path) -> list[str]:
    """Files, links and empty directories below `root`; the virtual environment is one entry."""
    found = {path.relative_to(root) for path in root.rglob("*")}
    venvs = {path for path in found if path.name == "venv"}
    outside = {path for path in found if not any(venv in path.parents for venv in venvs)}
    holders = {parent for path in outside for parent in path.parents}
    return sorted(str(path) for path in outside - holders)


def small_checkout(folder: Path) -> Path:
    """A checkout with our packaging, whose programs do nothing."""
    shutil.copytree(CHECKOUT / "packaging", folder / "packaging")
    (folder / "etc").mkdir()
    (folder / "daemon/mgpu_llm").mkdir(parents=True)
    (folder / "packaging/requirements/daemon.txt").write_text("setuptools\nwheel\n")
    (folder / "pyproject.toml").write_text(SMALL_PROJECT)
    (folder / "README.md").touch()
    (folder / "LICENSE").touch()
    (folder / "etc/mgpu-llm.toml").touch()
    (folder / "daemon/mgpu_llm/__init__.py").touch()
    (folder / "daemon/mgpu_llm/__main__.py").write_text("def main(): pass\n")
    (folder / "daemon/mgpu_llm/share.py").write_text(SMALL_SHARE)
    return folder


@pytest.fixture(scope="module")
def destdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout, installed as for a package."""
    folder = tmp_path_factory.mktemp("install") / "with space"
    must(packaging_install("install", folder))
    return folder


@pytest.fixture(scope="module")
def installed(destdir: Path, booted: BootedSystemd) -> BootedSystemd:
    """A machine onto which that package was unpacked."""
    unpack(destdir, booted)
    return booted


def unpack(destdir: Path, booted: BootedSystemd) -> None:
    shutil.copytree(destdir, booted.root, symlinks=True, dirs_exist_ok=True)
    booted.must("systemd-sysusers")
    booted.must("systemd-tmpfiles", "--create", "mgpu-llm.conf")
    booted.must("systemctl", "daemon-reload")


def test_an_install_puts_exactly_these_files_there(destdir: Path) -> None:
    assert tree(destdir) == TREE
    scripts = {path.name for path in (destdir / VENV / "bin").iterdir()}
    assert {"mgpud", "mgpuctl", "python3"} <= scripts
    assert scripts.isdisjoint({"pip", "activate"})
    assert (destdir / "etc/mgpu-llm/mgpu-llm.toml").read_bytes() == (CHECKOUT / "etc/mgpu-llm.toml").read_bytes()


def test_bash_completes_with_what_was_installed(installed: BootedSystemd) -> None:
    script = "source /usr/local/share/bash-completion/completions/mgpuctl && COMP_WORDS=(mgpuctl inc) COMP_CWORD=1"
    script += ' && _mgpuctl_completion mgpuctl && echo "${COMPREPLY[@]}"'
    assert installed.must("bash", "-c", script) == "incidents incident\n"


def test_what_was_installed_for_a_package_runs_at_its_final_place_as_the_service_user(installed: BootedSystemd) -> None:
    as_user = ("setpriv", "--reuid=mgpu-llm", "--regid=mgpu-llm", "--init-groups")
    assert "--config" in installed.must(*as_user, "/usr/local/bin/mgpud", "--help")
    assert "status" in installed.must(*as_user, "/usr/local/bin/mgpuctl", "--help")


def test_the_unit_is_verified_by_systemd_without_a_remark(installed: BootedSystemd) -> None:
    for unit in ("mgpu-llm.service", "mgpu-llm@big.service"):
        done = installed.run("systemd-analyze", "verify", "--man=no", unit)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_unit_is_as_little_exposed_as_its_comments_say(installed: BootedSystemd) -> None:
    told = installed.must("systemd-analyze", "security", "--offline=yes", "--no-pager", "mgpu-llm.service")
    (level,) = re.findall(r"Overall exposure level for mgpu-llm\.service: ([\d.]+)", told)
    assert float(level) <= 2.2, told


def test_the_service_can_write_its_own_places_and_no_others(installed: BootedSystemd) -> None:
    places = "/etc /usr/local /var/lib /var/log /home /root /boot /proc/sys/kernel /sys/kernel"
    script = f"for place in {places}; do (: >$place/written) 2>/dev/null && exit 1; done; : >/run/lock/written; exit 65"
    assert run_as_the_service(installed, script)["ExecMainStatus"] == "65"


def test_the_service_gains_no_privileges_and_sees_no_device_but_gpus(installed: BootedSystemd) -> None:
    script = "grep -q '^NoNewPrivs:.1$' /proc/self/status && grep -q '^CapBnd:.0*$' /proc/self/status || exit 1\n"
    script += "unshare --user true && exit 2; mount -t tmpfs none /mnt && exit 3; (: </dev/kmsg) && exit 4\nexit 65"
    assert run_as_the_service(installed, script)["ExecMainStatus"] == "65"


def test_a_unit_with_a_misspelt_setting_is_not_verified(installed: BootedSystemd) -> None:
    unit = installed.must("systemctl", "cat", "mgpu-llm.service").replace("WatchdogSec", "WatchdogSecs")
    installed.write("/tmp/mgpu-llm-misspelt.service", unit)
    done = installed.run("systemd-analyze", "verify", "--man=no", "/tmp/mgpu-llm-misspelt.service")
    assert "WatchdogSecs" in done.stderr


def test_the_service_user_has_the_groups_of_gpu_nodes_and_owns_its_directories(installed: BootedSystemd) -> None:
    groups = installed.must("id", "-nG", "mgpu-llm").split()
    assert {"mgpu-llm", "video", "render", "systemd-journal"} == set(groups)
    owners = installed.must("stat", "-c", "%U:%G %a", "/var/lib/mgpu-llm", "/var/cache/mgpu-llm")
    assert owners.splitlines() == ["mgpu-llm:mgpu-llm 750"] * 2


def run_as_the_service(booted: BootedSystemd, script: str) -> dict[str, str]:
    """Starts the unit with `script` in the place of mgpud; gives how that ended."""
    booted.write("/usr/local/lib/instead-of-mgpud", script)
    start = "[Service]\nExecStart=\nExecStart=/bin/sh /usr/local/lib/instead-of-mgpud\n"
    booted.write("/run/systemd/system/mgpu-llm.service.d/instead.conf", start)
    booted.must("systemctl", "daemon-reload")
    assert booted.run("systemctl", "start", "mgpu-llm").returncode != 0
    ended = booted.show("mgpu-llm", "ExecMainStatus", "SubState", "NRestarts")
    booted.must("systemctl", "stop", "mgpu-llm")
    booted.run("systemctl", "reset-failed", "mgpu-llm")  # for the start limit; an error where nothing failed
    return ended


@pytest.mark.parametrize("code", ["65", "69", "78"])
def test_a_start_that_would_end_the_same_way_again_is_not_repeated(installed: BootedSystemd, code: str) -> None:
    ended = run_as_the_service(installed, f"exit {code}")
    assert ended == {"ExecMainStatus": code, "SubState": "failed", "NRestarts": "0"}


def test_a_daemon_that_broke_is_started_again(installed: BootedSystemd) -> None:
    assert run_as_the_service(installed, "exit 70")["SubState"] == "auto-restart"


def test_the_service_may_write_to_each_place_that_its_environment_names(installed: BootedSystemd) -> None:
    places = "$XDG_CACHE_HOME $HF_HOME $VLLM_CACHE_ROOT $VLLM_CONFIG_ROOT $TORCHINDUCTOR_CACHE_DIR"
    places += " $TORCH_EXTENSIONS_DIR $TRITON_CACHE_DIR $FLASHINFER_WORKSPACE_BASE $CUDA_CACHE_PATH"
    places += " $RUNTIME_DIRECTORY $HOME /tmp . /dev/shm"
    script = f"set -eu; for place in {places}; do mkdir -p $place; : >$place/written; rm $place/written; done; exit 65"
    assert run_as_the_service(installed, script)["ExecMainStatus"] == "65"


def live(booted: BootedSystemd, verb: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make install` or `make uninstall` by root on the machine itself."""
    pip: Mapping[str, str] = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    install = str(CHECKOUT / "packaging/install")
    return booted.run(install, verb, timeout_s=400, env={**pip, **environment})


def test_an_upgrade_keeps_the_administrators_config_and_an_uninstall_all_but_that(destdir: Path) -> None:
    with booted_systemd() as machine:
        unpack(destdir, machine)
        upgrade(machine)
        uninstall(machine)


def upgrade(installed: BootedSystemd) -> None:
    installed.write("/etc/mgpu-llm/mgpu-llm.toml", "# mine\n")
    installed.write(f"/{VENV}/of-the-old-version", "")
    said = must(live(installed, "install"))
    assert "kept '/etc/mgpu-llm/mgpu-llm.toml'" in said
    assert installed.must("cat", "/etc/mgpu-llm/mgpu-llm.toml") == "# mine\n"
    assert installed.must("cat", "/etc/mgpu-llm/mgpu-llm.toml.new") == (CHECKOUT / "etc/mgpu-llm.toml").read_text()
    assert installed.must("ls", "/usr/local/lib/mgpu-llm") == "venv\n"
    assert not (installed.root / VENV / "of-the-old-version").exists()
    installed.must("/usr/local/bin/mgpuctl", "--help")
    assert "mgpu-llm: The engine stalled" in installed.must("journalctl", "--list-catalog")
    assert installed.show("mgpu-llm", "LoadState", "NeedDaemonReload") == {
        "LoadState": "loaded",
        "NeedDaemonReload": "no",
    }


def uninstall(installed: BootedSystemd) -> None:
    installed.must("systemctl", "enable", "mgpu-llm")
    must(live(installed, "uninstall"))
    assert installed.must("cat", "/etc/mgpu-llm/mgpu-llm.toml") == "# mine\n"
    assert installed.show("mgpu-llm", "LoadState") == {"LoadState": "not-found"}
    assert traces(installed) == [
        "/etc/mgpu-llm",
        "/etc/mgpu-llm/mgpu-llm.toml",
        "/var/cache/mgpu-llm",
        "/var/lib/mgpu-llm",
    ]

    must(live(installed, "uninstall", PURGE="1"))
    assert traces(installed) == []
    assert installed.run("getent", "passwd", "mgpu-llm").returncode == 2
    assert installed.run("getent", "group", "mgpu-llm").returncode == 2


def traces(booted: BootedSystemd) -> list[str]:
    """Every path of ours on the machine."""
    return sorted(booted.must("find", "/etc", "/var", "/usr/local", "/run", "-xdev", "-name", "mgpu*").split())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small checkout, and where it is installed with the prefix /opt/mgpu."""
    folder = tmp_path_factory.mktemp("small")
    checkout = small_checkout(folder / "checkout")
    must(packaging_install("install", folder / "dest", checkout, PREFIX="/opt/mgpu"))
    return checkout, folder / "dest"


def test_another_prefix_has_its_unit_in_etc_and_the_unit_starts_what_is_there(small: tuple[Path, Path]) -> None:
    _, dest = small
    assert tree(dest) == [
        "etc/mgpu-llm/conf.d",
        "etc/mgpu-llm/mgpu-llm.toml",
        "etc/systemd/system/mgpu-llm-devices.service",
        "etc/systemd/system/mgpu-llm.service",
        "etc/systemd/system/mgpu-llm@.service",
        "etc/sysusers.d/mgpu-llm.conf",
        "etc/tmpfiles.d/mgpu-llm.conf",
        "opt/mgpu/bin/mgpuctl",
        "opt/mgpu/bin/mgpud",
        "opt/mgpu/lib/mgpu-llm/venv",
        "opt/mgpu/share/man/man1/mgpuctl.1",
        "opt/mgpu/share/mgpu-llm/grafana/mgpu-llm.json",
        "opt/mgpu/share/mgpu-llm/prometheus/mgpu-llm.rules.yml",
        "opt/mgpu/share/mgpu-llm/prometheus/scrape.example.yml",
        "usr/local/lib/systemd/catalog/mgpu-llm.catalog",
    ]
    unit = (dest / "etc/systemd/system/mgpu-llm.service").read_text()
    assert "ExecStart=/opt/mgpu/bin/mgpud --config /etc/mgpu-llm/mgpu-llm.toml\n" in unit
    template = (dest / "etc/systemd/system/mgpu-llm@.service").read_text()
    assert "ExecReload=/opt/mgpu/bin/mgpuctl --socket %t/mgpu-llm/control.sock reload\n" in unit
    assert "ExecReload=/opt/mgpu/bin/mgpuctl --socket %t/mgpu-llm@%i/control.sock reload\n" in template
    example = (dest / "opt/mgpu/share/mgpu-llm/prometheus/scrape.example.yml").read_text()
    assert "  - /opt/mgpu/share/mgpu-llm/prometheus/mgpu-llm.rules.yml\n" in example
    script = (dest / "opt/mgpu/lib/mgpu-llm/venv/bin/mgpud").read_text()
    assert script.startswith("#!/opt/mgpu/lib/mgpu-llm/venv/bin/python3\n")


def test_a_failed_upgrade_says_what_failed_and_leaves_the_old_install_untouched(small: tuple[Path, Path]) -> None:
    checkout, dest = small
    before = stamps(dest)

    (checkout / "daemon/mgpu_llm/__main__.py").write_text("import no_such_module\n")
    done = packaging_install("install", dest, checkout, PREFIX="/opt/mgpu")
    assert done.returncode != 0
    assert "no_such_module" in done.stderr
    assert done.stderr.endswith("mgpu-llm: cannot install: could not run what was built, see above\n")

    done = packaging_install("install", dest, checkout, PREFIX="/opt/mgpu", PYTHON="/bin/false")
    assert done.returncode != 0
    assert done.stderr == "mgpu-llm: cannot install: '/bin/false' is not Python 3.11 or later; set PYTHON\n"
    assert stamps(dest) == before


def test_an_uninstall_of_a_package_tree_leaves_the_config_and_a_purge_nothing(destdir: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    shutil.copytree(destdir, dest, symlinks=True)
    must(packaging_install("uninstall", dest))
    assert list(stamps(dest)) == [str(dest / "etc/mgpu-llm/mgpu-llm.toml")]
    must(packaging_install("uninstall", dest, PURGE="1"))
    assert stamps(dest) == {}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PREFIX": "opt"}, "PREFIX is 'opt'; give an absolute path"),
        ({"PREFIX": "/opt/a b"}, "PREFIX is '/opt/a b'; use letters, digits"),
        ({"DESTDIR": "dest"}, "DESTDIR is 'dest'; give an absolute path"),
    ],
)
def test_a_place_that_cannot_work_is_refused_before_anything_is_done(
    tmp_path: Path, environment: dict[str, str], named: str
) -> None:
    done = packaging_install("install", tmp_path, CHECKOUT, **environment)
    assert done.returncode == 1
    assert named in done.stderr
    assert list(tmp_path.iterdir()) == []
