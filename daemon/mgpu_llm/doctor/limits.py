"""What the kernel and systemd allow the engine's user: pinned memory, files, tasks, looks at stacks."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from typing import Final

from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject, gib
from mgpu_llm.doctor.system import System
from mgpu_llm.doctor.unit import Unit

SUBJECT: Final = Subject("limits")
#: Each client is a socket, and each GPU and shard some files more. vLLM itself raises its soft limit to the hard one, up to 65535
#: (utils/system_utils.py, 0.32.0).
FILES: Final = 4096
LEAST_FILES: Final = 1024
#: Threads of a rank: OpenMP's, NCCL's, and those of up to 32 compilers.
TASKS_A_RANK: Final = 500
#: Users below are the system's own, to systemd (SYS_UID_MAX of login.defs).
FIRST_LOGIN_USER: Final = 1000


def of_this_process(system: System, name: str) -> Unit:
    """The limits that we run under, as the unit of that name has them."""
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Unit(
        user="",
        name=name,
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        files=None if files == resource.RLIM_INFINITY else files,
        tasks=system.group_limit("pids", "pids.max", "pids.max"),
    )


def check(system: System, limits: Unit, who: Account, ranks: int) -> Iterator[Finding]:
    """`limits` are those under which the engine will run."""
    whose = f"of {limits.user}'s service" if limits.user else "of this session"
    edit = f"sudo systemctl edit {limits.name}"
    yield _memlock(limits.memlock_bytes, whose, edit, infiniband=bool(system.names("/sys/class/infiniband")))
    if limits.files is None or limits.files >= FILES:
        yield SUBJECT.ok("limits-files", f"open files {whose}: {limits.files or 'no limit'}")
    else:
        seen = f"open files {whose}: {limits.files}, and each client is one"
        said = SUBJECT.problem if limits.files < LEAST_FILES else SUBJECT.warning
        yield said("limits-files", seen, f"{edit}: LimitNOFILE=65536; in a shell: ulimit -n 65536")
    yield _threads(limits.tasks, whose, edit, ranks)
    yield ptrace(system.text("/proc/sys/kernel/yama/ptrace_scope").strip(), who)
    if finding := _remove_ipc(system, who):
        yield finding


def ptrace(scope: str, who: Account) -> Finding:
    """`scope` is Yama's ptrace_scope, "" where the kernel has no Yama."""
    if scope in ("", "0") or (who.uid == 0 and scope != "3"):
        return SUBJECT.ok("limits-ptrace", "mgpud may look where the engine's threads stand")
    seen = f"kernel.yama.ptrace_scope is {scope}: mgpud cannot see where the engine's threads stand, and waits twice as long"
    lasting = "echo 'kernel.yama.ptrace_scope = 0' | sudo tee /etc/sysctl.d/60-mgpu-llm.conf"
    cure = f"sudo sysctl kernel.yama.ptrace_scope=0; for good: {lasting}"
    return SUBJECT.warning("limits-ptrace", seen, "a reboot without it" if scope == "3" else cure)


def _memlock(limit: int | None, whose: str, edit: str, *, infiniband: bool) -> Finding:
    if limit is None:
        return SUBJECT.ok("limits-memlock", f"locked memory {whose}: no limit")
    seen = f"locked memory {whose}: {gib(limit)}"
    if not infiniband:
        return SUBJECT.ok("limits-memlock", f"{seen}, and no InfiniBand that would need more")
    seen = f"{seen}; NCCL fails to register memory with InfiniBand under a limit"
    cure = f"{edit}: LimitMEMLOCK=infinity; in a shell: ulimit -l unlimited; docker run --ulimit memlock=-1"
    return SUBJECT.warning("limits-memlock", seen, cure)


def _threads(limit: int | None, whose: str, edit: str, ranks: int) -> Finding:
    wanted = TASKS_A_RANK * max(ranks, 1)
    if limit is None or limit >= wanted:
        return SUBJECT.ok("limits-tasks", f"processes and threads {whose}: {limit or 'no limit'}")
    seen = f"processes and threads {whose}: {limit}, and {max(ranks, 1)} ranks with their compilers take up to {wanted}"
    return SUBJECT.warning("limits-tasks", seen, f"{edit}: TasksMax=infinity; docker run --pids-limit=-1")


def _remove_ipc(system: System, who: Account) -> Finding | None:
    """NCCL's user guide, "shared memory": systemd-logind takes away what a user who logs out has in /dev/shm."""
    if who.uid < FIRST_LOGIN_USER or not system.exists("/run/systemd/system"):
        return None
    files = ["/etc/systemd/logind.conf"]
    files += [f"/etc/systemd/logind.conf.d/{name}" for name in system.names("/etc/systemd/logind.conf.d")]
    told = [
        found for name in files for found in re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", system.text(name), re.MULTILINE)
    ]
    if told and told[-1].lower() in ("no", "false", "off", "0"):
        return None
    seen = f"{who.name} (uid {who.uid}) is a login user: when its last session ends, systemd-logind removes the engine's /dev/shm"
    return SUBJECT.warning(
        "limits-logind", seen, "run it as a system user, or RemoveIPC=no in /etc/systemd/logind.conf"
    )
