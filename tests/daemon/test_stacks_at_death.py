"""A daemon that may look into no process of its engine still learns where it stood."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.evidence import incidents, told
from tests.support.fake_engine import COMMAND
from tests.support.no_ptrace import closed_python, without_rights

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give rights up")
STALLS_ONCE = "hang-init unless NCCL_P2P_DISABLE=1"


def settings(folder: Path) -> dict[str, object]:
    """The fake engine, run by a Python that may not be read; as its weights it reads another."""
    script = folder / "engine.py"
    script.write_text(
        f"import runpy, sys\nsys.executable = {sys.executable!r}\nrunpy.run_path({COMMAND[-1]!r}, run_name='__main__')\n"
    )
    return {"engine.command": [str(closed_python(folder)), "-S", str(script)], "patience.distributed_init": 2}


def test_the_processes_of_a_stall_print_their_stacks_and_the_next_attempt_serves(begin: Begin, tmp_path: Path) -> None:
    life = without_rights(lambda: begin(STALLS_ONCE, settings(tmp_path)))
    status = life.ready()
    (folder,) = incidents(life)
    assert "ptrace is not allowed" in (folder / "stacks.txt").read_text()
    assert "stacks-at-death.txt" not in told(folder)["not_observed"]
    words = (folder / "stacks-at-death.txt").read_text()
    heads = [line for line in words.splitlines() if line.startswith("# pid ")]
    assert len(heads) == words.count("Fatal Python error: Aborted") >= 3
    assert [head.split("(")[1].split(",")[0] for head in heads][-2:] == ["VLLM::EngineCor", "python3"]
    assert " in break_down" in words
    # That it died of it is no other failure, and no word of it is among the engine's own.
    assert [(one["outcome"], one["cause"]) for one in status["attempts"]][:1] == [
        ("stalled", "stalled-in-distributed-init")
    ]
    assert len(status["attempts"]) == 2
    assert life.story().count("engine.crashed") == 0
    assert "Fatal Python error" not in life.log()
    assert life.stop() == 0


def test_an_engine_that_ended_by_itself_is_asked_nothing(begin: Begin, tmp_path: Path) -> None:
    life = without_rights(lambda: begin("exit=3 unless attempt>=2", settings(tmp_path)))
    life.ready()
    (folder,) = incidents(life)
    assert not (folder / "stacks-at-death.txt").exists()
    assert life.stop() == 0


def test_the_admin_may_leave_it_off(begin: Begin, tmp_path: Path) -> None:
    off = {**settings(tmp_path), "engine.env.PYTHONFAULTHANDLER": ""}
    life = without_rights(lambda: begin(STALLS_ONCE, off))
    life.ready()
    (folder,) = incidents(life)
    assert told(folder)["not_observed"]["stacks-at-death.txt"] == "the engine runs without PYTHONFAULTHANDLER"
    assert life.stop() == 0
