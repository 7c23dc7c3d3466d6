"""mgpuctl reload."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mgpu_llm.ctl import exits
from tests.ctl.daemons import SampleBackend, daemon, mgpuctl


def test_what_holds_now_and_what_waits_are_said_with_the_command_for_that(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.reloaded = {
        "applied": ["patience.weights", "daemon.log_level"],
        "needs_restart": ["engine.args", "gpus.use"],
    }
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "reload")
        document = mgpuctl(socket_path, "reload", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "applied: patience.weights, daemon.log_level\n"
        "needs a restart: engine.args, gpus.use; do it with: systemctl restart mgpu-llm\n"
    )
    assert json.loads(document.stdout) == backend.reloaded
    asked, by = backend.asked[0]
    assert asked == "reload"
    assert by.startswith(f"uid {os.getuid()} (")


def test_a_config_that_is_as_it_was_is_nothing_to_do(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "reload")
    assert (done.returncode, done.stdout) == (0, "nothing to do: the config is as it was\n")


def test_every_problem_of_a_wrong_config_is_a_line_and_the_reload_fails(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.problems = ["a.toml: engine.port: found 0", "b.toml: \x1b[2Jnonsense"]
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "reload")
    assert (done.returncode, done.stdout) == (exits.REFUSED, "")
    assert done.stderr == (
        "a.toml: engine.port: found 0\n"
        "b.toml: \\x1b[2Jnonsense\n"
        "mgpuctl: cannot reload: the config is wrong; nothing has changed\n"
    )


def test_a_refusal_is_told_in_the_daemons_words(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.refusal = "cannot reload: the daemon is ending"
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "reload")
    assert (done.returncode, done.stderr) == (exits.REFUSED, "mgpuctl: cannot reload: the daemon is ending\n")


def test_without_a_daemon_there_is_nothing_to_reload(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "reload")
    assert done.returncode == exits.NO_DAEMON
    assert "start it with: systemctl start mgpu-llm" in done.stderr
