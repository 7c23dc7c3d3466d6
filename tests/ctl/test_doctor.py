"""mgpuctl doctor."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.ctl.doctor_page import doctor_lines, worst
from mgpu_llm.ctl.words import Page
from tests.ctl.mgpuds import Mgpud

PIPE = Page(colour=False, width=None)


def finding(level: str, seen: str = "something", fix: str = "", subject: str = "driver") -> dict[str, str]:
    return {"name": "a-check", "subject": subject, "level": level, "seen": seen, "fix": fix}


def document(*findings: dict[str, str]) -> dict[str, Any]:
    return {"user": "mgpu-llm", "config": "/etc/mgpu-llm/mgpu-llm.toml", "findings": list(findings)}


@pytest.fixture
def mgpud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mgpud:
    return Mgpud("doctor", tmp_path, monkeypatch)


def test_problems_stand_last_with_their_fix_above_the_sum() -> None:
    told = document(
        finding("problem", "no NVIDIA driver", "sudo modprobe nvidia-uvm"),
        finding("ok", "23 GiB available", subject="memory"),
        finding("warning", "the IOMMU translates", "iommu=pt", subject="links"),
        finding("unknown", "not known: only root sees it", subject="links"),
        finding("ok", "no limit", subject="limits"),
    )
    assert doctor_lines(told, PIPE) == [
        "Well:",
        "  memory     23 GiB available",
        "  limits     no limit",
        "",
        "Not known:",
        "  links      only root sees it",
        "",
        "Warnings:",
        "  links      the IOMMU translates",
        "             fix: iommu=pt",
        "",
        "Problems:",
        "  driver     no NVIDIA driver",
        "             fix: sudo modprobe nvidia-uvm",
        "",
        "1 problem, 1 warning, 1 not known, 2 ok; as user mgpu-llm, config /etc/mgpu-llm/mgpu-llm.toml",
    ]


def test_on_a_terminal_lines_are_cut_between_words_below_each_other() -> None:
    told = document(finding("problem", "a word " * 20, "a command " * 12))
    lines = doctor_lines(told, Page(colour=False, width=80))
    assert all(len(line) <= 80 for line in lines)
    assert (lines[1][:15], lines[2][:15]) == ("  driver     a ", " " * 13 + "wo")


def test_what_was_seen_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in "\n".join(doctor_lines(document(finding("warning", "pid 7: \x1b[2J", "kill \x1b[0m")), PIPE))


@pytest.mark.parametrize(
    ("levels", "status"), [(["ok", "unknown"], 0), (["ok", "warning"], 1), (["warning", "problem", "ok"], 2), ([], 0)]
)
def test_the_exit_status_is_the_worst_that_was_found(levels: list[str], status: int) -> None:
    assert worst(document(*map(finding, levels))) == status


def test_mgpud_is_asked_with_what_was_given(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(document(finding("warning"))))
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert mgpud.ctl("--config", "a.toml", "--user", me) == 1
    assert mgpud.asked == ["--doctor", "--config", "a.toml", "--user", me]
    assert capfd.readouterr().out.startswith("Warnings:\n")


def test_as_json_it_is_mgpuds_own_document(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(document(finding("problem"))))
    assert mgpud.ctl("--json") == 2
    assert json.loads(capfd.readouterr().out) == document(finding("problem"))
    assert mgpud.asked == ["--doctor"]


def test_a_user_that_there_is_not_is_a_wrong_command(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    assert mgpud.ctl("--user", "nobody-of-this-name") == 2
    assert "there is no user 'nobody-of-this-name'" in capfd.readouterr().err


def test_another_document_is_one_line(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints('{"findings": [3]}')
    assert mgpud.ctl() == 5
    assert capfd.readouterr().err == "mgpuctl: cannot examine this host: mgpud --doctor printed another document\n"


def test_a_mgpud_that_fails_is_one_line(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints("", complaint="no space\n", status=70)
    assert mgpud.ctl() == 8
    assert capfd.readouterr().err.splitlines() == [
        "no space",
        "mgpuctl: cannot examine this host: mgpud --doctor ended with exit status 70",
    ]
