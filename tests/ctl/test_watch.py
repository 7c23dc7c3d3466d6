from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mgpu_llm.control_api import status_to_json
from mgpu_llm.core.status import Status
from tests.ctl.daemons import (
    DEADLINE_S,
    SampleBackend,
    command,
    daemon,
    environment,
    foreign,
    http_reply,
    says,
    wait_for,
)
from tests.ctl.samples import FAILED, HEALTHY, LOADING, SERVING, STALLED, STARTING
from tests.ctl.terminal import Terminal, terminal


@contextmanager
def watching(socket_path: Path, screen: Terminal, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    ctl = subprocess.Popen(
        command("--socket", str(socket_path), "status", "--watch"),
        env=environment(**env),
        stdout=screen.slave,
        stderr=subprocess.PIPE,
    )
    try:
        yield ctl
    finally:
        ctl.kill()
        ctl.communicate(timeout=DEADLINE_S)


def picture(tmp_path: Path, status: Status, last: str, *, width: int = 80, height: int = 24, **env: str) -> Terminal:
    """What is on the terminal once `last` is, which the status brings with it."""
    with (
        daemon(tmp_path, SampleBackend(status)) as socket_path,
        terminal(width, height) as screen,
        watching(socket_path, screen, **env),
    ):
        wait_for(lambda: last in screen.text, last)
    return screen


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


def test_a_load_on_eight_gpus_is_drawn_on_80_by_24(tmp_path: Path) -> None:
    lines = picture(tmp_path, LOADING, "93 % busy").screen.lines
    assert lines == [
        "● Qwen/Qwen2.5-72B-Instruct",
        "starting for 3 min 50 s, quiet 2.2 s of 8 s, attempt 1 on rung base",
        "weights 38 %, 120 MB/s, about 9 min left",
        "boot              █████████████████████         22 s         usually 21 s",
        "distributed-init  █████████████████████         6.2 s        usually 6.0 s",
        "weights           ████████─────────────   38 %  3 min 23 s   usually 9 min",
        "compile           ─────────────────────                      usually 1 min 14 s",
        "kv-cache          ─────────────────────                      usually 3.0 s",
        "warm-up           ─────────────────────                      usually 42 s",
        "api               ─────────────────────                      usually 1.5 s",
        "GPU-0a2b3c4d      █────────────────────     1.0 of 80 GiB  100 % busy",
        "GPU-1a2b3c4d      ██───────────────────     9.0 of 80 GiB   99 % busy",
        "GPU-2a2b3c4d      ████─────────────────    17.0 of 80 GiB   98 % busy",
        "GPU-3a2b3c4d      ███████──────────────    25.0 of 80 GiB   97 % busy",
        "GPU-4a2b3c4d      █████████────────────    33.0 of 80 GiB   96 % busy",
        "GPU-5a2b3c4d      ███████████──────────    41.0 of 80 GiB   95 % busy",
        "GPU-6a2b3c4d      █████████████────────    49.0 of 80 GiB   94 % busy",
        "GPU-7a2b3c4d      ███████████████──────    57.0 of 80 GiB   93 % busy",
    ]


def test_a_wide_terminal_is_told_the_patience_and_all_failed_attempts(tmp_path: Path) -> None:
    status = replace(LOADING, attempts=(STALLED, replace(STALLED, number=2)), suspicion="nobody spins; looking again")
    lines = picture(tmp_path, status, "  2 on rung", width=200, height=50).screen.lines
    assert lines[3] == "nobody spins; looking again"
    assert lines[5].endswith("6.2 s        usually 6.0 s        patience 35 s (learnt)")
    assert len(lines[5]) < 200
    assert lines[-3] == "2 failed attempts: mgpuctl attempts"
    assert lines[-2] == (
        "  1 on rung base: stalled in distributed-init after 1 min 9 s: "
        "both GPUs spin in the first all-reduce and nothing else moves"
    )


def test_where_the_lines_do_not_suffice_the_screen_is_full_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    many = tuple(replace(STALLED, number=number) for number in range(1, 9))
    low = picture(tmp_path, replace(LOADING, attempts=many), "8 failed attempts: mgpuctl attempts", height=18)
    assert "6 more GPUs: mgpuctl status" not in low.screen.lines
    assert "5 more GPUs: mgpuctl status" in low.screen.lines
    assert len(low.screen.rows) == 18
    page = picture(tmp_path, replace(FAILED, attempts=many), "more lines: mgpuctl status)", height=18)
    assert len(page.screen.rows) == 18


def test_a_long_name_of_a_model_is_cut_so_that_its_end_is_read(tmp_path: Path) -> None:
    status = replace(LOADING, model=f"/srv/{'models/' * 30}模型-72B")
    first, second, *_ = picture(tmp_path, status, "93 % busy").screen.lines
    assert first.startswith("● /srv/models/models/mo")
    assert first.endswith("models/模型-72B")
    assert len(first) == 80 - len("模型")
    assert second.startswith("starting for ")


def test_a_terminal_without_colours_is_drawn_on_without_colours(tmp_path: Path) -> None:
    assert "\x1b[36m" in picture(tmp_path, LOADING, "93 % busy").raw
    plain = picture(tmp_path, LOADING, "93 % busy", NO_COLOR="1")
    assert not [code for code in ("\x1b[1m", "\x1b[2m", "\x1b[3", "\x1b[9") if code in plain.raw]
    assert "weights           ████████─────────────   38 %" in plain.text


def test_a_terminal_that_speaks_ascii_is_drawn_on_with_ascii(tmp_path: Path) -> None:
    status = replace(LOADING, model=f"{'models/' * 30}模型")
    screen = picture(tmp_path, status, "93 % busy", LC_ALL="C")
    assert screen.raw.isascii()
    assert screen.screen.lines[0].endswith("ls/\\u6a21\\u578b")
    assert len(screen.screen.lines[0]) == 80
    assert "weights           ########.............   38 %" in screen.text


def test_a_dumb_terminal_gets_one_line_for_each_step(tmp_path: Path) -> None:
    screen = picture(tmp_path, LOADING, "shards 3/8", TERM="dumb")
    assert screen.raw == "starting, attempt 1 on rung base, weights, shards 3/8\r\n"


def test_after_ctrl_c_the_last_picture_stays_on_the_terminals_own_screen(tmp_path: Path) -> None:
    backend = SampleBackend(LOADING)
    with daemon(tmp_path, backend) as socket_path, terminal(80, 24) as screen, watching(socket_path, screen) as ctl:
        os.write(screen.slave, b"$ mgpuctl status --watch\n")
        wait_for(lambda: "93 % busy" in screen.text, "the load")
        assert screen.screen.left
        ctl.send_signal(signal.SIGINT)
        _, complaints = ctl.communicate(timeout=DEADLINE_S)
        os.write(screen.slave, b"$ \n")
        wait_for(lambda: screen.raw.endswith("$ \r\n"), "the prompt")
    assert (ctl.returncode, complaints) == (0, b"")
    assert not screen.screen.left
    assert screen.screen.cursor_visible
    assert screen.text.count("weights 38 %, 120 MB/s, about 9 min left") == 1


def test_ctrl_z_gives_the_shell_its_own_screen_and_fg_draws_again(tmp_path: Path) -> None:
    backend = SampleBackend(LOADING)
    with daemon(tmp_path, backend) as socket_path, terminal(80, 24) as screen, watching(socket_path, screen) as ctl:
        wait_for(lambda: "93 % busy" in screen.text, "the load")
        ctl.send_signal(signal.SIGTSTP)
        wait_for(lambda: screen.screen.left is None and screen.screen.cursor_visible, "the shell's screen")
        _, status = os.waitpid(ctl.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        ctl.send_signal(signal.SIGCONT)
        wait_for(lambda: screen.screen.left is not None and "93 % busy" in screen.text, "the load again")


def test_sigterm_gives_the_terminal_back_too(tmp_path: Path) -> None:
    backend = SampleBackend(LOADING)
    with daemon(tmp_path, backend) as socket_path, terminal(80, 24) as screen, watching(socket_path, screen) as ctl:
        wait_for(lambda: "93 % busy" in screen.text, "the load")
        ctl.terminate()
        assert ctl.wait(DEADLINE_S) == 0
        wait_for(lambda: screen.screen.left is None and screen.screen.cursor_visible, "the shell's screen")


def test_nonsense_from_the_daemon_is_told_and_asked_about_again(tmp_path: Path) -> None:
    document = {**status_to_json(LOADING), "weights_percent": "soon"}
    reply = says(http_reply(json.dumps(document).encode()))
    with (
        foreign(tmp_path / "s", reply) as socket_path,
        terminal() as screen,
        watching(socket_path, screen) as ctl,
    ):
        wait_for(lambda: "asking again every 0.5 s" in screen.text, "the complaint")
        assert "does not speak as mgpud does" in " ".join(screen.text.split())
        assert ctl.poll() is None
