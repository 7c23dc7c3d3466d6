"""Memory and limits, from the files that a host shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.doctor import limits, memory
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding
from mgpu_llm.doctor.unit import Unit, parse
from tests.doctor.hosts import Host, levels, named

GIB = 1 << 30
SERVICE = Account(name="mgpu-llm", uid=998, gid=998, groups=(998, 44), home="/var/lib/mgpu-llm")
FREE_UNIT = Unit(user="mgpu-llm", files=65536)
PRESSURE = "some avg10={some} avg60=0.00 avg300=0.00 total=12345\nfull avg10={full} avg60=0.00 avg300=0.00 total=1234\n"


def host_with(folder: Path, *, available: int, swap: int = 0, pressure: str = "0.00") -> Host:
    host = Host(folder)
    host.has(
        "/proc/meminfo",
        f"MemTotal:       {256 * GIB >> 10} kB\nMemFree:         1234567 kB\nMemAvailable:   {available >> 10} kB\n"
        f"SwapFree:       {swap >> 10} kB\nHugePages_Total:       0\n",
    )
    host.has("/proc/pressure/memory", PRESSURE.format(some=pressure, full=pressure))
    return host


def of(host: Host, *, ranks: int = 4, weights: int | None = None, limit: int | None = None) -> list[Finding]:
    return list(memory.check(host.system, ranks=ranks, weights=weights, limit=limit))


def test_a_host_with_room_for_the_model_and_its_ranks_is_well(tmp_path: Path) -> None:
    found = of(host_with(tmp_path, available=200 * GIB), weights=140 * GIB)
    assert levels(found) == {"memory-free": "ok", "memory-limit": "ok", "memory-pressure": "ok"}
    assert named(found, "memory-free").seen == "200 GiB of 256 GiB available, no swap"


@pytest.mark.parametrize(
    ("available", "swap", "level"),
    [(150, 0, "warning"), (17, 0, "warning"), (4, 0, "problem"), (4, 16, "warning"), (200, 0, "ok")],
)
def test_memory_has_to_do_for_the_ranks_and_should_for_the_models_files(
    tmp_path: Path, available: int, swap: int, level: str
) -> None:
    found = of(host_with(tmp_path, available=available * GIB, swap=swap * GIB), weights=140 * GIB)
    assert named(found, "memory-free").level == level


@pytest.mark.parametrize(
    ("limit", "level"),
    [(None, "ok"), (200 * GIB, "ok"), (100 * GIB, "warning"), (8 * GIB, "warning"), (4 * GIB, "problem")],
)
def test_a_limit_of_the_control_group_has_to_do_too(tmp_path: Path, limit: int | None, level: str) -> None:
    found = of(host_with(tmp_path, available=200 * GIB), weights=140 * GIB, limit=limit)
    assert named(found, "memory-limit").level == level


def test_a_host_that_thrashes_is_told_with_how_much(tmp_path: Path) -> None:
    told = named(of(host_with(tmp_path, available=200 * GIB, pressure="42.17")), "memory-pressure")
    assert (told.level, "42.17 %" in told.seen) == ("warning", True)


def test_what_the_kernel_does_not_tell_is_not_known(tmp_path: Path) -> None:
    found = of(Host(tmp_path))
    assert levels(found) == {"memory-free": "unknown", "memory-limit": "ok", "memory-pressure": "unknown"}


def test_strict_overcommit_is_told(tmp_path: Path) -> None:
    host = host_with(tmp_path, available=200 * GIB)
    host.has("/proc/sys/vm/overcommit_memory", "2\n")
    assert named(of(host), "memory-overcommit").level == "warning"


@pytest.mark.parametrize(
    ("total", "free", "ranks", "level"),
    [
        (64 << 20, 64 << 20, 2, "problem"),  # a container without --shm-size
        (64 << 20, 64 << 20, 1, "ok"),
        (1 * GIB, 600 << 20, 2, "warning"),
        (1 * GIB, 800 << 20, 2, "ok"),
        (16 * GIB, 0, 8, "problem"),  # full of what others have left
    ],
)
def test_shared_memory_has_to_do_for_the_messages_between_ranks(total: int, free: int, ranks: int, level: str) -> None:
    assert memory.shm(total, free, ranks).level == level


def test_shared_memory_that_is_full_wants_to_be_emptied_and_not_to_be_larger() -> None:
    assert memory.shm(16 * GIB, 0, 8).fix.startswith("ls -lS /dev/shm")
    assert memory.shm(64 << 20, 64 << 20, 8).fix.startswith("sudo mount -o remount,size=50% /dev/shm")


def test_shared_memory_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    (problem,) = memory.shared(Host(tmp_path).system, 2)
    assert (problem.level, problem.seen) == ("problem", "cannot use /dev/shm: no such file or directory")


def test_the_least_limit_on_the_way_up_counts_in_either_version_of_control_groups(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert memory.group_limit(host.system) is None
    host.has("/proc/self/cgroup", "0::/system.slice/docker-1.scope\n")
    host.has("/sys/fs/cgroup/system.slice/docker-1.scope/memory.max", "max\n")
    host.has("/sys/fs/cgroup/system.slice/memory.max", "8589934592\n")
    assert memory.group_limit(host.system) == 8589934592
    host.has("/proc/self/cgroup", "4:memory:/docker/1\n3:cpu:/other\n0::/\n")
    host.has("/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", "4294967296\n")
    host.has("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory.group_limit(host.system) == 4294967296


def limited(host: Host, unit: Unit, who: Account = SERVICE) -> dict[str, str]:
    return levels(list(limits.check(host.system, unit, who, ranks=4)))


def test_what_the_unit_of_ours_has_is_enough(tmp_path: Path) -> None:
    told = limited(Host(tmp_path), FREE_UNIT)
    assert told == {"limits-memlock": "ok", "limits-files": "ok", "limits-tasks": "ok", "limits-ptrace": "ok"}


def test_limits_that_are_met_while_loading_or_serving_are_told(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.has("/sys/class/infiniband/mlx5_0/node_type", "1: CA\n")
    tight = replace(FREE_UNIT, memlock_bytes=8 << 20, files=1024, tasks=512)
    told = limited(host, tight)
    assert told == {
        "limits-memlock": "warning",
        "limits-files": "warning",
        "limits-tasks": "warning",
        "limits-ptrace": "ok",
    }
    assert limited(host, replace(tight, files=256))["limits-files"] == "problem"


def test_locked_memory_matters_only_where_there_is_infiniband(tmp_path: Path) -> None:
    assert limited(Host(tmp_path), replace(FREE_UNIT, memlock_bytes=8 << 20))["limits-memlock"] == "ok"


@pytest.mark.parametrize(
    ("scope", "uid", "level"),
    [
        ("", 998, "ok"),
        ("0", 998, "ok"),
        ("1", 998, "warning"),
        ("2", 998, "warning"),
        ("1", 0, "ok"),
        ("3", 0, "warning"),
    ],
)
def test_yama_may_keep_the_daemon_from_the_engines_stacks(scope: str, uid: int, level: str) -> None:
    assert limits.ptrace(scope, replace(SERVICE, uid=uid)).level == level


@pytest.mark.parametrize(
    ("uid", "config", "told"),
    [
        (1000, "", True),
        (998, "", False),
        (1000, "[Login]\n#RemoveIPC=yes\nRemoveIPC=no\n", False),
        (1000, "[Login]\n#RemoveIPC=no\n", True),
    ],
)
def test_logind_takes_shared_memory_from_users_who_log_out(tmp_path: Path, uid: int, config: str, told: bool) -> None:
    host = Host(tmp_path)
    host.has("/run/systemd/system/marker")
    host.has("/etc/systemd/logind.conf", config)
    assert ("limits-logind" in limited(host, FREE_UNIT, replace(SERVICE, uid=uid))) is told


SHOWN = """\
LoadState=loaded
User=mgpu-llm
Environment=HF_HOME=/var/cache/mgpu-llm/huggingface "NOTE=two words"
LimitMEMLOCK=infinity
LimitNOFILE=65536
TasksMax=18446744073709551615
MemoryMax=8589934592
"""


def test_a_unit_tells_its_user_environment_and_limits() -> None:
    assert parse(SHOWN) == Unit(
        user="mgpu-llm",
        environment={"HF_HOME": "/var/cache/mgpu-llm/huggingface", "NOTE": "two words"},
        files=65536,
        memory_bytes=8 * GIB,
    )


def test_a_unit_that_is_not_installed_is_none_and_one_without_a_user_is_roots() -> None:
    assert parse(SHOWN.replace("loaded", "not-found")) is parse("") is None
    roots = parse(SHOWN.replace("User=mgpu-llm", "User=").replace('"NOTE=two words"', '"NOTE'))
    assert (roots and roots.user, roots and roots.environment) == ("root", {})
