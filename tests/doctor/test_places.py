"""Disks, device files, ports and the user who will need them, on the real kernel."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu_llm.adapters import instance_lock
from mgpu_llm.config.endpoint import Listening
from mgpu_llm.doctor import account, devices, disks, ports
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.disks import Mount
from mgpu_llm.doctor.system import System
from tests.doctor.hosts import OPEN, Host, levels, named

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root can look as another user")
MOUNTS = """\
/dev/nvme0n1p2 / ext4 rw,relatime 0 0
tmpfs /tmp tmpfs rw,nosuid,nodev,noexec 0 0
nas:/models /models nfs4 rw,vers=4.2 0 0
/dev/sdb1 /srv/my\\040models xfs rw 0 0
overlay / overlay rw,lowerdir=/a 0 0
"""


@pytest.fixture
def me() -> Account:
    return account.account(None) if not ROOT else account.account("root")


@pytest.fixture
def nobody() -> Account:
    return account.account("nobody")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


@pytest.fixture
def reachable(tmp_path: Path) -> Path:
    """A folder that every user may go into, as pytest's own are not."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", "popen-", "test_")):
            folder.chmod(0o755)
    return tmp_path


def test_a_user_is_known_by_name_with_all_groups(me: Account) -> None:
    assert (me.uid, me.name) == (os.geteuid(), pwd.getpwuid(os.geteuid()).pw_name)
    assert me.gid in me.groups or me.gid == 0
    assert me.group_names
    with pytest.raises(LookupError, match='no user "nobody-of-this-name"'):
        account.account("nobody-of-this-name")


def test_the_kernel_is_asked_what_a_user_may_do(tmp_path: Path, me: Account) -> None:
    file = tmp_path / "with\nline end"
    file.write_text("")
    file.chmod(0o600)
    assert account.access(me, [file, tmp_path, tmp_path / "missing"]) == ["erw", "erwx", ""]
    assert account.access(me, []) == []


@as_root
def test_root_may_ask_for_another_user(reachable: Path, nobody: Account) -> None:
    open_to_all, closed = reachable / "open", reachable / "closed"
    for path, mode in ((open_to_all, 0o644), (closed, 0o600)):
        path.write_text("")
        path.chmod(mode)
    assert account.access(nobody, [open_to_all, closed]) == ["er", "e"]


def test_nobody_else_may(tmp_path: Path, nobody: Account) -> None:
    if ROOT:
        pytest.skip("root may")
    assert account.access(nobody, [tmp_path]) is None


def test_mounts_are_told_with_kind_and_options() -> None:
    found = disks.mounts(MOUNTS)
    assert found[3] == Mount(place="/srv/my models", kind="xfs", options=frozenset({"rw"}))
    assert [mount.network for mount in found] == [False, False, True, False, False]
    kinds = {
        path: mount.kind
        for path in ("/models/a", "/models", "/modelsx", "/tmp/x", "/srv/my models/b")
        if (mount := disks.mount_of(path, found))
    }
    assert kinds == {
        "/models/a": "nfs4",
        "/models": "nfs4",
        "/modelsx": "overlay",
        "/tmp/x": "tmpfs",
        "/srv/my models/b": "xfs",
    }
    assert disks.mount_of("/x", []) is None


@pytest.mark.parametrize(("free", "level"), [(100 << 30, "ok"), (2 << 30, "warning"), (100 << 20, "problem")])
def test_a_disk_has_to_have_room_for_what_is_compiled(free: int, level: str) -> None:
    assert disks.room(free, 500 << 30, "/ (ext4)", ["HF_HOME"]).level == level


def test_the_caches_of_this_host_are_looked_at(tmp_path: Path, me: Account) -> None:
    found = list(disks.check(System(), {"HOME": str(tmp_path)}, str(tmp_path / "state"), me))
    assert named(found, "disks-write").level == "ok"
    assert all(finding.level != "unknown" for finding in found)


def test_a_cache_on_a_disk_that_runs_nothing_is_a_problem(tmp_path: Path, me: Account) -> None:
    host = Host(tmp_path / "root")
    host.has("/proc/self/mounts", f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw,noexec 0 0\n")
    environ = {"HOME": "/", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    problem = named(list(disks.check(host.system, environ, "/", me)), "disks-noexec")
    assert (problem.level, "TRITON_CACHE_DIR" in problem.seen) == ("problem", True)


@as_root
def test_a_place_that_the_user_may_not_write_in_is_told_with_who_should_own_it(
    reachable: Path, nobody: Account
) -> None:
    home, state = reachable / "home", reachable / "var" / "state"
    home.mkdir(mode=0o755)
    state.parent.mkdir(mode=0o755)
    found = list(disks.check(System(), {"HOME": str(home), "TMPDIR": "/tmp"}, str(state), nobody))
    caches, memory = [finding for finding in found if finding.name == "disks-write"]
    assert (caches.level, memory.level) == ("problem", "warning")
    assert f"HF_HOME: {home}/.cache/huggingface, " in caches.seen
    assert memory.fix == f"sudo install -d -o nobody {state}, or set daemon.state_dir"


@as_root
def test_a_folder_that_is_there_keeps_its_owner(reachable: Path, nobody: Account) -> None:
    state, file = reachable / "state", reachable / "file"
    state.mkdir(mode=0o755)
    file.write_text("")
    of = {
        "HOME": "/",
        **dict.fromkeys(("TMPDIR", "HF_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"), "/tmp"),
    }
    of["CUDA_CACHE_PATH"] = "/tmp"
    (finding,) = [found for found in disks.check(System(), of, str(state), nobody) if found.name == "disks-write"]
    assert finding.fix == f"sudo setfacl -m u:nobody:rwx {state}, or set daemon.state_dir"
    (finding,) = [found for found in disks.check(System(), of, f"{file}/a", nobody) if found.name == "disks-write"]
    assert finding.fix.startswith(f"{file} is no folder")


def test_a_hardened_tmp_that_runs_nothing_is_no_problem_by_itself(tmp_path: Path, me: Account) -> None:
    host = Host(tmp_path / "root")
    host.has("/proc/self/mounts", f"/dev/sda1 / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw,noexec 0 0\n")
    found = list(disks.check(host.system, {"HOME": "/", "TMPDIR": str(tmp_path)}, "/", me))
    assert named(found, "disks-noexec").level == "warning"


def test_a_host_without_a_driver_has_no_device_files_to_look_at(tmp_path: Path, me: Account) -> None:
    assert list(devices.check(Host(tmp_path).system, me)) == []


def test_device_files_that_the_user_may_use_are_well(tmp_path: Path, me: Account) -> None:
    host = Host(tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
        host.has(f"/dev/{name}")
    (fine,) = devices.check(host.system, me, 2)
    assert (fine.level, "all 4" in fine.seen) == ("ok", True)


def test_device_files_that_are_missing_are_made_by_the_drivers_own_program(tmp_path: Path, me: Account) -> None:
    host = Host(tmp_path)
    host.has("/proc/driver/nvidia/version", OPEN)
    host.has("/dev/nvidia0")
    host.has("/dev/nvidiactl")
    found = [finding for finding in devices.check(host.system, me, 2) if finding.level == "problem"]
    assert [finding.seen for finding in found] == ["there is no /dev/nvidia-uvm", "1 device files for 2 GPUs"]
    assert [finding.fix for finding in found] == ["sudo nvidia-modprobe -u -c 0", "sudo nvidia-modprobe -c 1"]
    host.has("/.dockerenv")
    contained = [finding.fix for finding in devices.check(host.system, me, 2) if finding.level == "problem"]
    assert all(fix.startswith("docker run --gpus all") for fix in contained)


def test_a_slice_is_opened_through_a_file_of_its_own_kind(tmp_path: Path, me: Account) -> None:
    host = Host(tmp_path)
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        host.has(f"/dev/{name}")
    problem, _ = devices.check(host.system, me, 1, sliced=True)
    assert (problem.level, "/dev/nvidia-caps" in problem.seen) == ("problem", True)
    assert problem.fix.startswith("sudo nvidia-modprobe -f FILE")
    host.has("/dev/nvidia-caps/nvidia-cap21")
    (fine,) = devices.check(host.system, me, 1, sliced=True)
    assert fine.level == "ok"


@as_root
def test_device_files_of_a_group_want_the_user_in_it(reachable: Path, nobody: Account) -> None:
    host = Host(reachable)
    video = 44
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        path = host.has(f"/dev/{name}")
        os.chown(path, 0, video)
        path.chmod(0o660)
    (problem,) = devices.check(host.system, nobody)
    assert (problem.level, problem.fix.startswith("sudo usermod -aG video nobody")) == ("problem", True)
    for path in (host.root / "dev").iterdir():
        os.chown(path, 0, 0)
    (problem,) = devices.check(host.system, nobody)
    assert "NVreg_DeviceFileMode=0666" in problem.fix


def test_a_port_that_is_taken_is_told_with_who_has_it_and_its_command(
    tmp_path: Path, listener: socket.socket, me: Account
) -> None:
    port = listener.getsockname()[1]
    problem = named(list(ports.check(System(), Listening(host="127.0.0.1", port=port), tmp_path, me)), "ports-engine")
    assert problem.level == "problem"
    assert f"(pid {os.getpid()}) has the port: " in problem.seen
    command = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
    assert problem.seen.split(" has the port: ")[1].startswith(command[0])
    assert problem.fix == f"sudo kill {os.getpid()}, or set another engine.port"


def test_a_daemon_that_runs_has_the_port_by_right(tmp_path: Path, listener: socket.socket, me: Account) -> None:
    port = listener.getsockname()[1]
    with instance_lock.held(tmp_path):
        found = list(ports.check(System(), Listening(host="127.0.0.1", port=port), tmp_path, me))
    assert levels(found) == {"ports-engine": "ok", "ports-control": "warning"}


def test_a_free_port_and_a_folder_for_the_control_socket_are_well(
    tmp_path: Path, listener: socket.socket, me: Account
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    found = list(ports.check(System(), Listening(host="127.0.0.1", port=port), tmp_path / "run", me))
    assert levels(found) == {"ports-engine": "ok", "ports-control": "ok"}


def test_a_unix_socket_that_somebody_has_wants_another(tmp_path: Path, me: Account) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "api"))
        listening.listen()
        where = Listening(host="", port=0, uds=str(tmp_path / "api"))
        problem = named(list(ports.check(System(), where, tmp_path, me)), "ports-engine")
    assert (problem.level, problem.fix) == ("problem", "another --uds in engine.args")
