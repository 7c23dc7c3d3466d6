"""A real systemd, booted as PID 1 of private namespaces over an overlay of this host's root file system.

What a test does inside (install, start units, write files, fill /dev/shm) is seen by nobody outside and is gone afterwards. The
network alone is shared with the host: a port that a unit listens on is a port of the host, so tests take free ones.

The host's own units are not started. The checkout and the Python that runs the tests are there at their own paths, and
every user inside may read them. `/tmp` and `/run` are fresh, but for a checkout that lies there; a unit with PrivateTmp=yes
cannot see one below /tmp, unless it says BindReadOnlyPaths.

A keeper, in a session of its own, waits until its standard input is closed, by the test or by the test's death, and then
kills and removes everything. Should the keeper itself be killed, systemd dies with it.
"""

import os
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[2]
SYSTEMD: Final = Path("/lib/systemd/systemd")
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHM_BYTES: Final = 8 << 30  # a ceiling, not a reservation
BOOT_TIMEOUT_S: Final = 120.0  # a boot takes about one second; a loaded machine gets time

# Started in the namespaces, ends as PID 1. Arguments: an empty directory, the size of /dev/shm, directories to bind read-only.
_INIT: Final = r"""
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
base=$1 shm_bytes=$2
shift 2
mount -t tmpfs -o mode=0755 mgpu-booted "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" overlay "$base/root"
cd "$base/root"

mount -t proc proc proc
# Read-only, as systemd-nspawn has them: else sysctl.d, udev and modules-load would change the host's kernel.
for path in proc/sys proc/sysrq-trigger; do
    [ -e "$path" ] || continue # not every kernel has it
    mount --bind "$path" "$path"
    mount -o remount,bind,ro "$path"
done
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=0755 tmpfs dev
for node in null zero full random urandom tty; do
    : >"dev/$node"
    mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
mount -t tmpfs -o "mode=1777,size=$shm_bytes" tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
ln -s null dev/console

for path in "$@"; do
    mkdir -p "./$path"
    mount --bind "$path" "./$path"
    mount -o remount,bind,ro "./$path"
done

tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
echo mgpu-booted >etc/hostname
: >etc/fstab
touch etc/.updated var/.updated
# The host's own services would take its ports. What else is masked waits for hardware, would speak to the host's kernel, or would
# take the host's /dev/null for a console.
rm -rf etc/systemd/system var/log/journal
mkdir etc/systemd/system
for unit in systemd-journald-audit.socket systemd-modules-load.service modprobe@.service getty.target systemd-logind.service \
    systemd-udevd.service systemd-udev-trigger.service systemd-networkd.service systemd-timesyncd.service \
    rescue.service emergency.service; do
    ln -s /dev/null "etc/systemd/system/$unit"
done

mkdir run/host
pivot_root . run/host
umount -l run/host
rmdir run/host
# As systemd does it itself outside of containers: what it mounts for a unit's credentials comes from a process of its own.
mount --make-rshared /
exec env -i container=other "PATH=$PATH" "NOTIFY_SOCKET=$NOTIFY_SOCKET" \
    /lib/systemd/systemd --system --unit=multi-user.target </dev/null
"""

# Arguments: an empty directory, a cgroup to make, the init script and its arguments. Says the process id of `unshare`, then
# waits for the end of its input: that comes with any end of the test, so the clean-up does not depend on how it ended.
_KEEPER: Final = r"""
set -eu
trap '' HUP INT TERM
scratch=$1 cgroup=$2 unshare=none
shift 2
finish() {
    # Once it has PID 1 as its child, `unshare` is let out of the cgroup: it lives to reap PID 1, then ends by itself.
    forked=$(cat "/proc/$unshare/task/$unshare/children" 2>/dev/null || true)
    [ -z "$forked" ] || echo "$unshare" >"${cgroup%/*}/cgroup.procs"
    [ ! -e "$cgroup/cgroup.kill" ] || echo 1 >"$cgroup/cgroup.kill"
    wait
    tries=0
    while [ -e "$cgroup" ] && [ $((tries += 1)) -le 500 ]; do
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.02
    done
    rm -rf "$scratch"
}
trap finish EXIT
mkdir "$scratch/base" "$cgroup"
sh -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$cgroup" \
    setpriv --pdeathsig KILL unshare -m -p -u -i -C --fork --kill-child sh -c "$@" </dev/null >&2 &
unshare=$!
echo "$unshare"
while read -r ignored; do :; done
"""


class CannotBootError(Exception):
    """This machine cannot boot a systemd in namespaces; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BootedSystemd:
    """The running system: `pid` is its PID 1 as the host sees it, `cgroup` its root as the host sees it."""

    pid: int
    cgroup: Path

    @property
    def root(self) -> Path:
        """Its root directory, seen from outside. An absolute symbolic link in there would lead out; `run` has no such trap."""
        return Path(f"/proc/{self.pid}/root")

    def run(
        self, *argv: str, timeout_s: float = 60.0, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs `argv` inside, as root in /, with a bare environment plus `env`; raises `subprocess.TimeoutExpired`.

        It dies at the timeout, and with the caller, but its own children need not. Its cgroup is the caller's.
        """
        enter = ("nsenter", f"--target={self.pid}", "-m", "-p", "-u", "-i", "-C", "--root", "--wd")
        return subprocess.run(
            [*enter, "setpriv", "--pdeathsig", "KILL", "--", *argv],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env={"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root", "SYSTEMD_PAGER": "", **(env or {})},
        )

    def must(self, *argv: str, timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> str:
        """`run`, but any exit code except 0 is an AssertionError with everything that was said; returns standard output."""
        done = self.run(*argv, timeout_s=timeout_s, env=env)
        assert done.returncode == 0, f"{argv} exited {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Writes a file inside, its parent directories too (mode 0755)."""
        script = 'mkdir -p "${1%/*}" && cat >"$1" && chmod "$2" "$1"'
        done = self.run("sh", "-c", script, "sh", str(path), f"{mode:o}", stdin=text)
        if done.returncode != 0:
            raise OSError(f"cannot write '{path}' inside the booted systemd: {done.stderr.strip()}")

    def journal(self, unit: str, *options: str) -> str:
        """What the unit, and systemd about it, said since the boot: bare messages, or as journalctl's `options` say."""
        self.must("journalctl", "--sync")
        return self.must("journalctl", f"--unit={unit}", "--no-pager", "--quiet", *(options or ("--output=cat",)))

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as `systemctl show` gives them."""
        shown = self.must("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in shown.splitlines())


@contextmanager
def booted_systemd() -> Iterator[BootedSystemd]:
    """Boots, gives the running system, and leaves nothing of it behind; raises CannotBootError with the reason."""
    own_cgroup = _own_cgroup()
    scratch = Path(tempfile.mkdtemp(prefix="mgpu-booted-"))
    cgroup = own_cgroup / scratch.name
    log = scratch / "log"
    with _notify_socket(cgroup.name) as notify, log.open("wb") as log_file:
        init = [_INIT, "mgpu-booted-init", str(scratch / "base"), str(SHM_BYTES), *map(str, _invisible_in_overlay())]
        keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER, "mgpu-booted-keeper", str(scratch), str(cgroup), *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,
            env={"PATH": PATH, "NOTIFY_SOCKET": f"@{cgroup.name}"},
        )
        with keeper:  # leaving it closes the keeper's input and waits for its end
            pid = _wait_until_booted(keeper, notify, log)
            # PID 1 goes on telling it about every unit, and blocks for good once nobody reads and the queue is full.
            notify.close()
            booted = BootedSystemd(pid=pid, cgroup=cgroup)
            _open_to_every_user(booted)
            yield booted


def _own_cgroup() -> Path:
    """Where in the cgroup2 hierarchy we may make a cgroup, after a look at the rest of what a boot needs."""
    if os.geteuid() != 0:
        raise CannotBootError("cannot boot a systemd: it needs root; run the system tests as root")
    tools = ("unshare", "nsenter", "setpriv", "pivot_root", str(SYSTEMD))
    if missing := [tool for tool in tools if shutil.which(tool, path=PATH) is None]:
        raise CannotBootError(f"cannot boot a systemd: no {', '.join(missing)}; apt install systemd util-linux")
    mounts = [line.split(" - ", 1) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    roots = [Path(where.split()[4]) for where, what in mounts if what.startswith("cgroup2 ")]
    if not roots:
        raise CannotBootError("cannot boot a systemd: no cgroup2 is mounted; mount -t cgroup2 cgroup2 /mnt")
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    cgroup = roots[0] / own.lstrip("/")
    if not os.access(cgroup, os.W_OK):  # as in a container that was given its cgroups read-only
        raise CannotBootError(f"cannot boot a systemd: '{cgroup}' is read-only; run the container with --privileged")
    return cgroup


def _invisible_in_overlay() -> list[Path]:
    """What of checkout and Python an overlay of / does not show: what is on other mounts, or below the fresh ones."""
    needed = {CHECKOUT, Path(sys.prefix), Path(sys.base_prefix)}
    device = Path("/").stat().st_dev
    return sorted(path for path in needed if path.stat().st_dev != device or path.parts[1] in ("tmp", "run", "dev"))


def _open_to_every_user(booted: BootedSystemd) -> None:
    """Lets services that are not root reach the checkout: root's home is closed to them. Only the overlay's copy changes."""
    for path in {*CHECKOUT.parents, *Path(sys.base_prefix).parents}:
        if not path.stat().st_mode & stat.S_IXOTH:
            booted.must("chmod", "a+x", str(path))


def _notify_socket(name: str) -> socket.socket:
    """Where PID 1 says READY=1: an abstract address, as both sides share the network but need not share a path."""
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(f"\0{name}")
    notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return notify


def _wait_until_booted(keeper: subprocess.Popen[str], notify: socket.socket, log: Path) -> int:
    """PID 1's process id out here, which the kernel puts beside its READY=1."""
    assert keeper.stdout is not None
    unshare = keeper.stdout.readline()
    if not unshare:
        raise CannotBootError(f"cannot boot a systemd: {log.read_text(errors='replace')}")
    pidfd = os.pidfd_open(int(unshare))
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([notify.fileno(), pidfd], [], [], left_s)
            if notify.fileno() in readable:
                message, credentials, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(12))
                if b"READY=1" in message.split(b"\n"):
                    pid: int = struct.unpack("=iII", credentials[0][2])[0]
                    return pid
            elif readable:
                break
    finally:
        os.close(pidfd)
    why = "its PID 1 ended" if left_s > 0 else f"not ready after {BOOT_TIMEOUT_S:.0f} s"
    raise CannotBootError(f"cannot boot a systemd: {why}; it said:\n{log.read_text(errors='replace')}")
