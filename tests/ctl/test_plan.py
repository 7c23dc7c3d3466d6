"""mgpuctl plan."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.control_api import UNKNOWN_CAUSE
from mgpu_llm.core import planning
from mgpu_llm.core.diagnosis import TABLE
from mgpu_llm.ctl.plan_page import plan_lines
from mgpu_llm.ctl.words import Page
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
from tests.ctl.mgpuds import Mgpud
from tests.ctl.samples import PLANS
from tests.ctl.terminal import terminal

PIPE = Page(colour=False, width=None)


def shown(tmp_path: Path, cause: str, width: int = 90) -> list[str]:
    with daemon(tmp_path, SampleBackend()) as socket_path, terminal(width=width) as screen:
        subprocess.run(
            command("--socket", str(socket_path), "plan", "--cause", cause),
            env=environment(),
            stdout=screen.slave,
            check=True,
            timeout=DEADLINE_S,
        )
    return screen.screen.lines


def test_what_the_next_start_begins_with_is_told_last_where_the_daemon_remembers_it() -> None:
    begins = {"rung": "p2p-off", "since": "2026-11-24T21:05:00Z"}
    lines = plan_lines({**PLANS["unknown"], "begins": begins}, PIPE)
    assert lines[-1].strip() == (
        "the next start begins on rung p2p-off, which has served since 2026-11-24T21:05:00Z (mgpuctl forget)"
    )
    assert plan_lines({**PLANS["unknown"], "begins": None}, PIPE) == plan_lines(PLANS["unknown"], PIPE) == lines[:-2]


def test_an_end_that_the_config_causes_says_so() -> None:
    ends = {name: "\n".join(plan_lines(PLANS[name], PIPE)) for name in ("nccl-p2p", "unknown")}
    assert "exit status 69: what could help has been tried" in ends["unknown"]
    assert "exit status 69: what else could help is not allowed" in ends["nccl-p2p"]


def test_without_a_cause_it_is_the_plan_for_what_nobody_knows(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "plan")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["unknown", "  any failure that no other cause explains"]


def test_the_base_comes_with_its_command_line_and_each_rung_with_changes_tries_and_cost(tmp_path: Path) -> None:
    assert shown(tmp_path, "unknown")[2:] == [
        " 1  base",
        "     the settings as configured",
        "     CUDA_VISIBLE_DEVICES=2,3 HF_TOKEN=... /opt/vllm/bin/vllm serve '/models/Qwen 72B' \\",
        "     --tensor-parallel-size 2 --api-key ... --gpu-memory-utilization 0.9 --enforce-eager \\",
        "     --port 8000",
        " 2  p2p-off",
        "     NCCL_P2P_DISABLE=1; --disable-custom-all-reduce",
        "     costs: all-reduce runs through host memory, at a tenth of the bandwidth",
        " 3  p2p-off+eager (2 tries)",
        "     NCCL_P2P_DISABLE=1; --disable-custom-all-reduce",
        "     costs: as 2",
        " 4  p2p-off+tp-1",
        "     NCCL_P2P_DISABLE=1; --disable-custom-all-reduce; GPUs 2,3 -> 2;",
        "     --tensor-parallel-size 2 -> 1",
        "     costs: as 2; 1 of 2 GPUs do all the work",
        "    then: the daemon gives up with exit status 69: what could help has been tried; systemd",
        "    does not start it again",
    ]


def test_the_wrapped_command_line_is_the_whole_one_for_a_shell_and_keeps_its_secrets(tmp_path: Path) -> None:
    base = PLANS["unknown"]["plans"][0]["rungs"][0]
    lines = [line.strip() for line in shown(tmp_path, "unknown", width=60)]
    start = lines.index("the settings as configured") + 1
    wrapped = lines[start : lines.index("2  p2p-off")]
    assert all(line.endswith(" \\") for line in wrapped[:-1])
    assert len(wrapped) > 3
    words = shlex.split("\n".join(wrapped).replace("\\\n", ""))
    assert words == ["CUDA_VISIBLE_DEVICES=2,3", "HF_TOKEN=...", *("..." if w == "s3cret" else w for w in base["argv"])]


def test_no_change_is_cut_in_two(tmp_path: Path) -> None:
    lines = [line.strip() for line in shown(tmp_path, "unknown", width=48)]
    at = lines.index("4  p2p-off+tp-1")
    assert lines[at + 1 : at + 5] == [
        "NCCL_P2P_DISABLE=1;",
        "--disable-custom-all-reduce; GPUs 2,3 -> 2;",
        "--tensor-parallel-size 2 -> 1",
        "costs: as 2; 1 of 2 GPUs do all the work",
    ]


def test_ways_that_are_met_alike_stand_together_and_each_is_told(tmp_path: Path) -> None:
    lines = shown(tmp_path, "model-refused")
    assert lines[:4] == [
        "model-refused",
        "  the model's ... attention heads cannot be shared by so many GPUs",
        "  these GPUs are too old for bfloat16",
        " 1  base",
    ]
    assert "gives up with exit status 65: no retry can help" in " ".join(lines)


def test_ways_that_are_met_otherwise_have_rungs_of_their_own_and_the_command_line_is_told_once() -> None:
    lines = plan_lines(PLANS["nccl-p2p"], PIPE)
    heads = [number for number, line in enumerate(lines) if line == "nccl-p2p"]
    assert [lines[number + 1].strip() for number in heads] == [
        "the IOMMU stops what the GPUs write to each other",
        "..., while every GPU spins",
    ]
    assert sum("vllm serve" in line for line in lines) == 1
    assert " 1  base (2 tries)" in lines[heads[1] :]


def test_what_is_not_in_it_is_told_with_the_reason_and_the_forbidden_with_the_key_that_releases_it() -> None:
    lines = plan_lines(PLANS["nccl-p2p"], PIPE)
    at = lines.index("    not in it:")
    assert lines[at : at + 4] == [
        "    not in it:",
        "      another GPU: gpus.spares names none that is left",
        "    not in it, because the config does not allow it:",
        "      a shorter context: clients would see it, and ladder.may_change does not name it",
    ]


def test_a_sentence_without_its_words_shows_no_braces() -> None:
    for cause in planning.causes():
        summaries = [row.cause for row in TABLE if row.reported_as == cause]
        one = PLANS["unknown"]["plans"][0]
        document = {"cause": cause, "plans": [{**one, "cause": cause, "summary": text} for text in summaries]}
        text = "\n".join(plan_lines(document, PIPE))
        assert not {"{", "}"} & set(text)
        assert "  ...\n" not in text
        assert "......" not in text


def test_another_exit_status_is_told_as_it_is() -> None:
    document: dict[str, Any] = {"cause": "x", "plans": [{**PLANS["unknown"]["plans"][0], "status": 70}]}
    assert plan_lines(document, PIPE)[-1] == "    then: the daemon gives up with exit status 70"


def test_the_words_of_a_daemon_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J"
    rung = {"name": evil, "tries": 1, "changes": [evil], "cost": evil, "argv": [evil, "a\nb"], "env": {"A": evil}}
    out = {"what": evil, "why": evil, "forbidden": False}
    one = {"summary": evil, "rungs": [rung], "outs": [out], "status": 69}
    for page in (PIPE, Page(colour=False, width=40)):
        assert "".join(plan_lines({"cause": evil, "plans": [one]}, page)).isprintable()


def test_json_is_the_whole_document(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "plan", "--cause", "nccl-p2p", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, PLANS["nccl-p2p"])


def test_an_unknown_cause_is_a_usage_error_with_those_that_there_are(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        close, far = (mgpuctl(socket_path, "plan", "--cause", cause) for cause in ("nccl-p2", "a b/ü?"))
    assert (close.returncode, close.stdout, far.returncode) == (2, "", 2)
    assert "there is no cause 'nccl-p2'; did you mean 'nccl-p2p' or" in close.stderr
    assert "there is no cause 'a b/ü?'\nThere are: bad-arguments, cuda-out-of-memory," in far.stderr
    assert far.stderr.endswith(" worker-vanished, unknown\n")


def test_the_cause_that_nobody_knows_is_the_cores() -> None:
    assert UNKNOWN_CAUSE == planning.UNKNOWN


@pytest.mark.parametrize("body", [b"{}", b'{"cause": "unknown", "plans": [{}]}', b'{"cause": "unknown", "plans": 3}'])
def test_an_answer_that_is_no_plan_is_nonsense(tmp_path: Path, body: bytes) -> None:
    with foreign(tmp_path / "s", says(http_reply(body))) as socket_path:
        done = mgpuctl(socket_path, "plan")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("mgpuctl: what answers on")


@pytest.fixture
def mgpud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mgpud:
    return Mgpud("plan", tmp_path, monkeypatch)


def test_without_a_daemon_mgpud_makes_it_and_that_is_said(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(PLANS["model-refused"]), complaint="a warning\n")
    assert mgpud.ctl("--cause", "model-refused") == 0
    assert mgpud.asked == ["--plan", "model-refused"]
    said = capfd.readouterr()
    assert said.out.startswith("model-refused\n")
    remark, warning = said.err.splitlines()
    assert remark.startswith("mgpuctl: no daemon answers on /")
    assert remark.endswith("/none; this is what mgpud makes of its config")
    assert warning == "a warning"


def test_for_another_config_no_daemon_is_asked(mgpud: Mgpud, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(PLANS["unknown"]))
    with daemon(tmp_path, SampleBackend()) as socket_path:
        assert mgpud.ctl("--config", "a b.toml", "--json", socket=socket_path) == 0
    assert mgpud.asked == ["--plan", "unknown", "--config", "a b.toml"]
    said = capfd.readouterr()
    assert (json.loads(said.out), said.err) == (PLANS["unknown"], "")


def test_what_mgpud_refuses_is_told_in_its_words(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints("", complaint="a.toml: model.path: missing\na.toml: gpus.use: \x1b[2J\n", status=78)
    assert mgpud.ctl("--config", "a.toml") == 8
    said = capfd.readouterr()
    assert (said.out, said.err.splitlines()) == (
        "",
        [
            "a.toml: model.path: missing",
            "a.toml: gpus.use: \\x1b[2J",
            "mgpuctl: cannot plan: mgpud --plan ended with exit status 78",
        ],
    )


@pytest.mark.parametrize("text", ["", "no JSON", "3", "[1]"])
def test_what_is_no_document_is_one_line(mgpud: Mgpud, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(text)
    assert mgpud.ctl("--config", "a.toml") == 5
    assert capfd.readouterr().err == "mgpuctl: cannot plan: mgpud --plan printed no JSON document\n"


def test_a_mgpud_that_does_not_end_is_given_up(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.is_given(0.5)
    mgpud.prints("", more="time.sleep(60)")
    assert mgpud.ctl("--config", "a.toml") == 5
    assert capfd.readouterr().err == "mgpuctl: cannot plan: mgpud --plan has not ended within 0.5 s\n"


def test_without_a_daemon_an_unknown_cause_is_a_usage_error_too(
    mgpud: Mgpud, capfd: pytest.CaptureFixture[str]
) -> None:
    mgpud.prints("", complaint="Error: no such cause\n", status=2)
    assert mgpud.ctl("--config", "a.toml", "--cause", "driver-stuk") == 2
    said = capfd.readouterr()
    assert "did you mean 'driver-stuck'" in said.err
    assert "no such cause" not in said.err
