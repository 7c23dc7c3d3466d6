"""mgpuctl status during a load."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.control_api import status_from_json, status_to_json
from mgpu_llm.core.status import Count, Status
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
from tests.ctl.samples import EIGHT_GPUS, LOADING, PHASES, STARTING
from tests.ctl.terminal import Terminal, terminal

NEW = ("phases", "weights_percent", "weights_bytes_per_s", "left_s", "suspicion")


def piped(tmp_path: Path, status: Status) -> str:
    with daemon(tmp_path, SampleBackend(status)) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert (done.returncode, done.stderr) == (1, "")
    return done.stdout


def on_terminal(tmp_path: Path, status: Status, **env: str) -> Terminal:
    with daemon(tmp_path, SampleBackend(status)) as socket_path, terminal(80, 24) as screen:
        subprocess.run(
            command("--socket", str(socket_path), "status"),
            env=environment(**env),
            stdout=screen.slave,
            check=False,
            timeout=DEADLINE_S,
        )
    return screen


def test_a_load_on_eight_gpus_fits_80_by_24_with_the_next_prompt(tmp_path: Path) -> None:
    screen = on_terminal(tmp_path, LOADING, NO_COLOR="1")
    assert screen.raw.count("\n") <= 22
    assert len(screen.screen.rows) == screen.raw.count("\n") + 1, "no line is wider than the terminal"
    assert screen.screen.lines == [
        "● mgpu-llm 0.1.0 - Qwen/Qwen2.5-72B-Instruct",
        "    State: starting for 3 min 50 s",
        "   Status: loading: weights 38 %, 230 s, attempt 1 on rung base",
        "      URL: http://127.0.0.1:8000 (not served yet)",
        "  Attempt: 1 on rung base, pid 4711, 12 processes",
        "    Phase: weights 38 %, 120 MB/s, about 9 min left",
        "    Quiet: nothing has moved for 2.2 s; after 8 s a stall is suspected",
        "   Phases:                   TOOK               USUALLY     QUIET AT MOST",
        "           boot              22 s               21 s        1 min",
        "           distributed-init  6.2 s              6.0 s       35 s (learnt)",
        "           weights           3 min 23 s so far  9 min       8 s",
        "           compile                              1 min 14 s  2 min",
        "           kv-cache                             3.0 s       1 min",
        "           warm-up                              42 s        1 min",
        "           api                                  1.5 s       1 min",
        "     GPUs: 0a2b3c4d    1.0/80 GiB 100 % busy   4a2b3c4d   33.0/80 GiB  96 % busy",
        "           1a2b3c4d    9.0/80 GiB  99 % busy   5a2b3c4d   41.0/80 GiB  95 % busy",
        "           2a2b3c4d   17.0/80 GiB  98 % busy   6a2b3c4d   49.0/80 GiB  94 % busy",
        "           3a2b3c4d   25.0/80 GiB  97 % busy   7a2b3c4d   57.0/80 GiB  93 % busy",
        "  mgpuctl status --watch   follow the start",
        "  mgpuctl logs             the engine's last lines",
    ]


def test_behind_a_pipe_each_gpu_has_its_line_and_its_whole_uuid(tmp_path: Path) -> None:
    page = piped(tmp_path, LOADING)
    assert all(f" {gpu.uuid}  " in page for gpu in EIGHT_GPUS)
    assert "GPUs: GPU-0a2b3c4d-7d1e-4b6f-9a5c-0123456789ab  1.0 of 80 GiB   100 % busy\n" in page


def test_gpus_are_called_as_the_config_calls_them_where_that_is_known(tmp_path: Path) -> None:
    named = tuple(replace(gpu, entry=str(number)) for number, gpu in enumerate(EIGHT_GPUS))
    assert f"GPUs: GPU 0  1.0 of 80 GiB   100 % busy  {named[0].uuid}\n" in piped(
        tmp_path, replace(LOADING, gpus=named)
    )
    page = on_terminal(tmp_path, replace(LOADING, gpus=named)).text
    assert "GPUs: GPU 0    1.0/80 GiB 100 % busy" in page
    assert named[0].uuid not in page


def test_gpus_that_a_short_name_does_not_tell_apart_keep_their_whole_uuid(tmp_path: Path) -> None:
    alike = tuple(replace(gpu, uuid=f"GPU-11111111-{number}") for number, gpu in enumerate(EIGHT_GPUS))
    page = on_terminal(tmp_path, replace(LOADING, gpus=alike)).text
    assert all(f" {gpu.uuid} " in page for gpu in alike)


def test_the_first_start_on_a_host_has_nothing_usual(tmp_path: Path) -> None:
    page = piped(tmp_path, replace(LOADING, phases=tuple(replace(phase, usual_s=None) for phase in PHASES)))
    assert "USUALLY" not in page
    assert "           boot              22 s               1 min\n" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights_bytes_per_s": None}, "weights 38 %, about 9 min left"),
        ({"left_s": None}, "weights 38 %, 120 MB/s"),
        ({"weights_percent": None, "phases": ()}, "weights, shards 3/8, 120 MB/s, about 9 min left"),
        ({"phase": "compile", "phases": ()}, "compile, about 9 min left"),
        (
            {"phase": "warm-up", "phases": (), "graphs": Count(done=3, total=35)},
            "warm-up, graphs 3/35, about 9 min left",
        ),
    ],
)
def test_what_is_not_known_of_a_phase_is_not_said(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert f"    Phase: {words}\n" in piped(tmp_path, replace(LOADING, **changes))


def test_a_suspicion_has_its_line_and_tells_the_quiet(tmp_path: Path) -> None:
    words = "suspected: nothing has moved for 9 s; looking where its threads stand"
    page = piped(tmp_path, replace(LOADING, suspicion=words))
    assert "Suspicion: nothing has moved for 9 s; looking where its threads stand\n" in page
    assert "Quiet" not in page
    assert "Suspicion" not in piped(tmp_path, LOADING)


def test_a_phase_that_was_passed_over_is_not_told_a_time(tmp_path: Path) -> None:
    boot, *others = PHASES
    page = piped(tmp_path, replace(LOADING, phases=(replace(boot, took_s=None), *others)))
    assert "           boot              not seen           21 s        1 min\n" in page


def test_an_older_daemon_is_understood_without_what_it_does_not_know(tmp_path: Path) -> None:
    document = {key: value for key, value in status_to_json(STARTING).items() if key not in NEW}
    document["gpus"] = [{key: gpu[key] for key in gpu if key != "total_bytes"} for gpu in document["gpus"]]
    document = json.loads(json.dumps(document))
    assert status_from_json(document) == STARTING
    with foreign(tmp_path / "s", says(http_reply(json.dumps(document).encode()))) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert "Phase: weights, shards 3/8\n" in done.stdout
    assert "Phases" not in done.stdout
    assert "GPU-11111111-aaaa  2.0 GiB used  100 % busy\n" in done.stdout


def test_a_load_survives_the_socket_unchanged_and_what_a_newer_daemon_adds_is_left_out() -> None:
    document = json.loads(json.dumps(status_to_json(LOADING)))
    assert status_from_json(document) == LOADING
    document["phases"][0]["mood"] = document["gpus"][0]["mood"] = "good"
    assert status_from_json(document) == LOADING


def test_a_phase_that_lacks_something_is_nonsense_and_no_traceback(tmp_path: Path) -> None:
    document = {**status_to_json(LOADING), "phases": [{"name": "boot"}]}
    with foreign(tmp_path / "s", says(http_reply(json.dumps(document).encode()))) as socket_path:
        done = mgpuctl(socket_path, "status")
    assert done.returncode == 5
    assert "does not speak as mgpud does" in done.stderr


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "", "LC_CTYPE": "", "LANG": "C"}])
def test_a_terminal_that_speaks_ascii_gets_ascii_and_a_pipe_the_bytes_as_they_are(
    tmp_path: Path, locale: dict[str, str]
) -> None:
    status = replace(LOADING, model="Qwen/模型")
    screen = on_terminal(tmp_path, status, **locale)
    assert screen.raw.isascii()
    assert screen.screen.lines[0] == "* mgpu-llm 0.1.0 - Qwen/\\u6a21\\u578b"
    with daemon(tmp_path, SampleBackend(status)) as socket_path:
        done = mgpuctl(socket_path, "status", **locale)
    assert "Qwen/模型\n" in done.stdout
