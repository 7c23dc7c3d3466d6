"""mgpuctl forget."""

from __future__ import annotations

import os
from pathlib import Path

from tests.ctl.daemons import SampleBackend, daemon, mgpuctl
from tests.ctl.samples import DEGRADED


def test_the_daemon_is_asked_and_says_what_it_did(tmp_path: Path) -> None:
    backend = SampleBackend(DEGRADED)
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "forget")
    assert (done.returncode, done.stdout, done.stderr) == (0, "forget accepted\n", "")
    [(asked, by)] = backend.asked
    assert asked == "forget"
    assert by.startswith(f"uid {os.getuid()} (")


def test_a_daemon_that_is_ending_refuses_in_its_words(tmp_path: Path) -> None:
    backend = SampleBackend(DEGRADED)
    backend.refusal = "cannot do that: the daemon is ending"
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "forget")
    assert (done.returncode, done.stderr) == (8, "mgpuctl: cannot do that: the daemon is ending\n")


def test_without_a_daemon_the_file_to_remove_is_named(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "forget")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"mgpuctl: no daemon answers on {tmp_path / 's'}; start it with: systemctl start mgpu-llm; without it, "
        "remove known-good.json below daemon.state_dir (/var/lib/mgpu-llm/known-good.json) "
        "and the next start begins with your settings\n"
    )
