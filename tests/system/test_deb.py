"""The Debian package, on the Debian that this host is: installed, upgraded, removed and purged as an administrator does it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.booted_systemd import CHECKOUT, BootedSystemd

pytestmark = pytest.mark.system
CONFIG = "/etc/mgpu-llm/mgpu-llm.toml"
OURS = "[daemon]\nlog_level = 'debug'  # the administrator's\n"
KEEP = ("-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package of this checkout, and one of a later version with another default config."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("this host is no Debian")
    folder = tmp_path_factory.mktemp("deb")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("daemon", "etc", "packaging"):
        leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=leave, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, checkout)
    done = subprocess.run([checkout / "packaging/deb/build"], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (first,) = (checkout / "dist").glob("mgpu-llm_*.deb")
    tree = folder / "later"
    subprocess.run(["dpkg-deb", "-R", first, tree], check=True, timeout=120)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 99:"))
    with (tree / CONFIG[1:]).open("a") as file:
        file.write("# a new default\n")
    later = folder / "later.deb"
    subprocess.run(
        ["dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, later], check=True, capture_output=True, timeout=120
    )
    return first, later


def apt(host: BootedSystemd, *words: str) -> str:
    noninteractive = {"DEBIAN_FRONTEND": "noninteractive"}
    return host.must("apt-get", "--yes", "--quiet", *KEEP, *words, timeout_s=300, env=noninteractive)


def there(host: BootedSystemd) -> set[str]:
    """Every file and link of ours outside of the package manager's own."""
    found = host.run(
        "find", "/etc", "/usr", "/var/lib", "/var/cache", "-name", "*mgpu*", "-not", "-path", "/var/lib/dpkg/*"
    )
    return {
        line
        for line in found.stdout.splitlines()
        if not line.startswith(("/etc/systemd/system/mgpu", "/var/lib/systemd"))
    }


def test_the_package_is_installed_upgraded_removed_and_purged(
    booted: BootedSystemd, packages: tuple[Path, Path]
) -> None:
    before = there(booted)
    for number, package in enumerate(packages):
        shutil.copy(package, booted.root / f"root/{number}.deb")

    assert "next: edit /etc/mgpu-llm/mgpu-llm.toml" in apt(booted, "install", "/root/0.deb")
    assert booted.run("mgpud", "--check").returncode == 78, "no model is set yet"
    assert booted.run("systemctl", "is-enabled", "mgpu-llm").stdout == "disabled\n"
    assert set(booted.must("id", "-nG", "mgpu-llm").split()) >= {"mgpu-llm", "video", "render"}
    assert "mgpud" in booted.must(
        "setpriv", "--reuid=mgpu-llm", "--regid=mgpu-llm", "--init-groups", "/usr/bin/mgpud", "--help"
    )
    told = booted.run("systemd-analyze", "verify", "--man=no", "mgpu-llm.service", "mgpu-llm@a.service")
    assert (told.returncode, told.stderr) == (0, "")
    assert booted.must("dpkg", "--verify", "mgpu-llm") == ""

    booted.write(CONFIG, OURS)
    booted.write("/etc/mgpu-llm/a.toml", "")
    booted.write("/var/lib/mgpu-llm/known-good.json", "{}")
    apt(booted, "install", "/root/1.deb")
    assert booted.must("dpkg-query", "-W", "-f", "${Version}", "mgpu-llm").startswith("99:")
    assert booted.must("cat", CONFIG) == OURS
    assert booted.must("tail", "-1", f"{CONFIG}.dpkg-dist") == "# a new default\n"

    apt(booted, "remove", "mgpu-llm")
    assert booted.run("sh", "-c", "command -v mgpud mgpuctl").stdout == ""
    assert booted.must("cat", CONFIG) == OURS
    assert booted.must("cat", "/var/lib/mgpu-llm/known-good.json") == "{}"

    apt(booted, "purge", "mgpu-llm")
    assert there(booted) - before == set()
    assert booted.run("getent", "passwd", "mgpu-llm").returncode != 0
    assert booted.run("getent", "group", "mgpu-llm", "mgpu-llm-admin").stdout == ""


def test_a_service_that_runs_goes_on_over_an_upgrade_and_ends_with_a_removal(
    booted: BootedSystemd, packages: tuple[Path, Path]
) -> None:
    first, later = packages
    for number, package in enumerate((first, later)):
        shutil.copy(package, booted.root / f"root/{number}.deb")
    apt(booted, "install", "/root/0.deb")
    stays = "[Service]\nType=exec\nExecStart=\nExecStart=sleep infinity\nWatchdogSec=0\n"
    for unit in ("mgpu-llm", "mgpu-llm@a"):
        booted.write(f"/run/systemd/system/{unit}.service.d/stays.conf", stays)
    booted.must("systemctl", "daemon-reload")
    booted.must("systemctl", "enable", "--now", "mgpu-llm", "mgpu-llm@a")
    said = apt(booted, "install", "/root/1.deb")
    assert "still runs as before; systemctl restart mgpu-llm\n" in said
    assert "still runs as before; systemctl restart mgpu-llm@a\n" in said
    assert booted.run("systemctl", "is-active", "mgpu-llm", "mgpu-llm@a").stdout == "active\nactive\n"
    apt(booted, "purge", "mgpu-llm")
    assert "active\n" not in booted.run("systemctl", "is-active", "mgpu-llm", "mgpu-llm@a").stdout.replace(
        "inactive\n", ""
    )
    assert booted.run("find", "/etc/systemd/system", "-name", "mgpu-llm*").stdout == ""
