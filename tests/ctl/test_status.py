from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

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
    mgpuctl,
    says,
)
from tests.ctl.samples import DEGRADED, FAILED, HEALTHY, SERVING, STALLED, STARTING, STATES
from tests.ctl.terminal import terminal

EXIT_CODES = {"ready": 0, "starting": 1, "terminating": 1, "killing": 1, "backoff": 1, "stopped": 6, "failed": 7}


def shown(tmp_path: Path, status: Status, *args: str) -> str:
    with daemon(tmp_path, SampleBackend(status)) as socket_path:
        done = mgpuctl(socket_path, "status", *args)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("state", STATES)
def test_each_state_has_its_exit_code_and_is_named_with_its_headline(tmp_path: Path, state: str) -> None:
    with daemon(tmp_path, SampleBackend(STATES[state])) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert (done.returncode, done.stderr) == (EXIT_CODES[state], "")
    assert f"    State: {state}" in done.stdout
    assert f"   Status: {STATES[state].headline.partition(chr(10))[0]}\n" in done.stdout
    assert "Qwen/Qwen2.5-72B-Instruct" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("state", STATES)
def test_json_is_the_whole_status_with_the_same_exit_code(tmp_path: Path, state: str) -> None:
    with daemon(tmp_path, SampleBackend(STATES[state])) as socket_path:
        done = mgpuctl(socket_path, "status", "--json")
    assert done.returncode == EXIT_CODES[state]
    assert json.loads(done.stdout) == json.loads(json.dumps(status_to_json(STATES[state])))


def test_json_keeps_what_a_newer_daemon_adds(tmp_path: Path) -> None:
    document = {**status_to_json(HEALTHY), "tokens_per_second": 12}
    with foreign(tmp_path / "s", says(http_reply(json.dumps(document).encode()))) as socket_path:
        done = mgpuctl(socket_path, "status", "--json")
        page = mgpuctl(socket_path, "status")
    assert json.loads(done.stdout)["tokens_per_second"] == 12
    assert (done.returncode, page.returncode) == (0, 0)


def test_a_degraded_service_says_its_rung_what_was_changed_and_what_it_costs(tmp_path: Path) -> None:
    page = shown(tmp_path, SERVING)
    assert "State: ready, degraded (rung p2p-off) for 41 s\n" in page
    assert "Cost: all-reduce runs through host memory, at a tenth of the bandwidth\n" in page
    assert "  Changes: NCCL_P2P_DISABLE=1\n           --disable-custom-all-reduce\n" in page
    assert "mgpuctl attempts" in page


def test_a_degraded_service_says_since_when_why_and_how_to_come_back_and_the_cost_once(tmp_path: Path) -> None:
    page = shown(tmp_path, DEGRADED)
    assert "Degraded: since 2026-11-24T21:05:00Z, because of stalled-in-distributed-init\n" in page
    assert " Way back: remove the cause, then: mgpuctl forget && mgpuctl restart\n" in page
    assert "  Changes: NCCL_P2P_DISABLE=1\n           --disable-custom-all-reduce\n" in page
    assert page.count(DEGRADED.cost) == 1
    assert "mgpuctl ladder" in page
    assert "mgpuctl attempts" not in page  # which has nothing to tell


def test_a_degraded_service_whose_cause_is_not_known_has_only_the_date(tmp_path: Path) -> None:
    assert DEGRADED.degradation
    page = shown(tmp_path, replace(DEGRADED, degradation=replace(DEGRADED.degradation, cause="")))
    assert "Degraded: since 2026-11-24T21:05:00Z\n" in page


def test_a_daemon_older_than_mgpuctl_says_nothing_of_a_degradation(tmp_path: Path) -> None:
    document = {key: value for key, value in status_to_json(DEGRADED).items() if key != "degradation"}
    with foreign(tmp_path / "s", says(http_reply(json.dumps(document).encode()))) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert done.returncode == 0
    assert "ready, degraded (rung p2p-off)" in done.stdout
    assert not [label for label in ("Degraded:", "Way back:") if label in done.stdout]


def test_a_daemon_newer_than_mgpuctl_may_tell_more_of_a_degradation(tmp_path: Path) -> None:
    document = status_to_json(DEGRADED)
    document["degradation"]["trials"] = 3
    with foreign(tmp_path / "s", says(http_reply(json.dumps(document).encode()))) as socket_path:
        assert "Degraded: since 2026-11-24" in mgpuctl(socket_path, "status").stdout


def test_a_healthy_service_has_neither_cost_nor_advice_nor_hints(tmp_path: Path) -> None:
    page = shown(tmp_path, HEALTHY)
    assert "State: ready for 41 s\n" in page
    assert not [word for word in ("Cost", "Changes", "Failed", "mgpuctl", "Quiet", "Retry") if word in page]
    assert "URL: http://127.0.0.1:8000\n" in page


def test_a_start_shows_its_phase_shards_silence_engine_and_gpus(tmp_path: Path) -> None:
    page = shown(tmp_path, replace(STARTING, lines_dropped=7))
    assert "Phase: weights, shards 3/8\n" in page
    assert "Quiet: nothing has moved for 2.2 s; after 20 s a stall is suspected\n" in page
    assert "Attempt: 2 on rung p2p-off, pid 4711, 4 processes, 7 lines of its output dropped\n" in page
    assert "GPUs: GPU-11111111-aaaa  2.0 GiB used  100 % busy\n" in page
    assert "           GPU-22222222-bbbb  1.5 GiB used\n" in page
    assert "http://127.0.0.1:8000 (not served yet)" in page


def test_unobserved_gpus_give_the_reason_and_no_number(tmp_path: Path) -> None:
    page = shown(tmp_path, replace(STARTING, gpus=(), gpus_unobserved="NVML did not answer within 2 s"))
    assert "GPUs: not observed: NVML did not answer within 2 s\n" in page
    assert "GiB" not in page


def test_each_failed_attempt_is_told_with_cause_summary_and_advice(tmp_path: Path) -> None:
    page = shown(tmp_path, FAILED)
    assert "1 on rung base: stalled in distributed-init after 1 min 9 s, 2 min 10 s ago\n" in page
    assert "2 on rung p2p-off: crashed in" in page
    assert page.count("    cause  ") == 2
    assert "    what   both GPUs spin in the first all-reduce and nothing else moves\n" in page
    assert "    to do  check the ACS setting of the PCIe switch\n" in page
    assert "mgpuctl start" in page
    assert "Status: gave up after 2 attempts:\n           1 on base: stalled\n           2 on p2p-off:" in page
    assert "State: failed\n" in page


def test_of_many_failed_attempts_the_last_five_are_told_and_the_others_counted(tmp_path: Path) -> None:
    many = tuple(replace(STALLED, number=number) for number in range(1, 9))
    page = shown(tmp_path, replace(FAILED, attempts=many))
    assert "(3 earlier: mgpuctl attempts)" in page
    assert [f"  {n} on rung" in page for n in range(1, 9)] == [False] * 3 + [True] * 5


def test_a_retry_says_when(tmp_path: Path) -> None:
    assert "Retry: in 4.0 s\n" in shown(tmp_path, STATES["backoff"])


def test_the_words_of_an_engine_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = replace(FAILED, headline="bell \x07 clear \x1b[2J", attempts=(replace(STALLED, summary="a\rb\x9b31mc"),))
    with daemon(tmp_path, SampleBackend(evil)) as socket_path, terminal() as screen:
        subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(NO_COLOR="1"),
            stdout=screen.slave,
            check=False,
            timeout=DEADLINE_S,
        )
    assert "bell \\x07 clear \\x1b[2J" in screen.raw
    assert "a\\rb\\x9b31mc" in screen.raw
    assert not {"\x1b", "\x07", "\x9b"} & set(screen.raw)


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_colour_is_for_terminals_that_want_it(tmp_path: Path, env: dict[str, str], coloured: bool) -> None:
    with daemon(tmp_path, SampleBackend(SERVING)) as socket_path, terminal() as screen:
        subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(**env),
            stdout=screen.slave,
            check=True,
            timeout=DEADLINE_S,
        )
    assert "ready, degraded" in screen.raw
    assert ("\x1b[33m" in screen.raw) is coloured


def test_behind_a_pipe_there_is_no_colour(tmp_path: Path) -> None:
    assert "\x1b" not in shown(tmp_path, SERVING)


def test_on_a_terminal_long_advice_is_wrapped_between_words_under_its_label(tmp_path: Path) -> None:
    advice = "free the GPU that another process holds, then run mgpuctl start and look at its status again"
    status = replace(FAILED, attempts=(replace(STALLED, advice=advice),))
    with daemon(tmp_path, SampleBackend(status)) as socket_path, terminal(width=60) as screen:
        subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(),
            stdout=screen.slave,
            check=False,
            timeout=DEADLINE_S,
        )
    lines = screen.screen.lines
    at = next(n for n, line in enumerate(lines) if line.startswith("    to do  free the GPU"))
    assert lines[at + 1].startswith("           ")
    assert " ".join(f"{lines[at][11:]} {lines[at + 1].strip()}".split()) == advice


def test_an_encoding_without_the_bullet_gets_a_star(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(replace(HEALTHY, model="modèle-模型"))) as socket_path:
        done = subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(PYTHONIOENCODING="latin-1"),
            capture_output=True,
            check=True,
            timeout=DEADLINE_S,
        )
    assert done.stdout.decode("latin-1").splitlines()[0] == "* mgpu-llm 0.1.0 - modèle-\\u6a21\\u578b"


def test_the_socket_can_be_named_in_the_environment(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path:
        done = subprocess.run(
            command("status"),
            env=environment(MGPU_LLM_SOCKET=str(socket_path)),
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 0


def test_a_plain_status_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys; from mgpu_llm.ctl.main import main; main(); print(*sys.modules, file=sys.stderr)"
    with daemon(tmp_path, SampleBackend(HEALTHY)) as socket_path:
        done = subprocess.run(
            [sys.executable, "-c", script, "--socket", os.fspath(socket_path), "status"],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE_S,
        )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "click" in loaded
    assert not loaded & {"aiohttp", "pydantic", "structlog", "pynvml", "rich", "asyncio", "sdnotify"}


def test_watch_and_json_exclude_each_other(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "none", "status", "--watch", "--json")
    assert done.returncode == 2
    assert "--watch and --json exclude each other" in done.stderr
