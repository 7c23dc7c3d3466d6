from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.ctl.daemons import DEADLINE_S, SampleBackend, command, daemon, environment, wait_for
from tests.ctl.samples import HEALTHY, SERVING, STARTING
from tests.ctl.terminal import Terminal, terminal


@contextmanager
def watching(socket_path: Path, screen: Terminal) -> Iterator[subprocess.Popen[bytes]]:
    ctl = subprocess.Popen(
        command("--socket", str(socket_path), "status", "--watch"),
        env=environment(),
        stdout=screen.slave,
        stderr=subprocess.PIPE,
    )
    try:
        yield ctl
    finally:
        ctl.kill()
        ctl.communicate(timeout=DEADLINE_S)


def test_watch_draws_over_itself_survives_the_daemon_and_ends_quietly_on_ctrl_c(tmp_path: Path) -> None:
    socket_path = tmp_path / "control.sock"
    with terminal() as screen, watching(socket_path, screen) as ctl:
        wait_for(lambda: "no daemon answers" in screen.text, "the word that there is no daemon")
        with daemon(tmp_path, SampleBackend(STARTING)):
            wait_for(lambda: "shards 3/8" in screen.text, "the start")
        wait_for(lambda: "no daemon answers" in screen.text, "the daemon's end")
        with daemon(tmp_path, SampleBackend(SERVING)):
            wait_for(lambda: "ready, degraded (rung p2p-off)" in screen.text, "the new daemon")
            assert "no daemon answers" not in screen.text
            assert screen.text.count("State:") == 1
            ctl.send_signal(signal.SIGINT)
            _, complaints = ctl.communicate(timeout=DEADLINE_S)
        assert (ctl.returncode, complaints) == (0, b"")
        wait_for(lambda: screen.screen.cursor_visible, "the cursor")


def test_behind_a_pipe_watch_prints_each_step_once(tmp_path: Path) -> None:
    backend = SampleBackend(STARTING)
    with daemon(tmp_path, backend) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "status", "--watch"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert ctl.stdout
        first = ctl.stdout.readline()
        backend.now = replace(STARTING, elapsed_s=42.0, headline="loading: 42 s")
        asked = backend.questions
        wait_for(lambda: backend.questions > asked + 1, "two more questions")
        backend.now = HEALTHY
        second = ctl.stdout.readline()
        ctl.send_signal(signal.SIGINT)
        rest, complaints = ctl.communicate(timeout=DEADLINE_S)
    assert [first, second, rest, complaints] == [
        "starting, attempt 2 on rung p2p-off, weights, shards 3/8\n",
        "ready, attempt 1 on rung base\n",
        "",
        "",
    ]
    assert ctl.returncode == 0
