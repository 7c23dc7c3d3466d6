"""The whole examination, of this host and with a driver library made small."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mgpu_llm import questions
from mgpu_llm.__main__ import main
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.config import parse
from mgpu_llm.doctor import account, examination
from mgpu_llm.doctor.examination import Check, examine
from mgpu_llm.doctor.facts import Patient
from mgpu_llm.doctor.finding import Finding, Subject
from mgpu_llm.startup import CannotStartError
from tests.support.fake_nvml import FakeGpu, FakeNvml

SUBJECT = Subject("tests")
#: For all of it, on a machine that others use too.
DEADLINE_S = 60


def doctor(*words: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    """What mgpud --doctor prints; stderr is empty."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mgpu_llm", "--doctor", *words],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def config(folder: Path, text: str) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 4}')
    file = folder / "mgpu-llm.toml"
    file.write_text(
        f'model.path = "{model}"\nengine.python = "{sys.executable}"\nengine.port = 18231\n'
        f'daemon.runtime_dir = "{folder}/run"\ndaemon.state_dir = "{folder}/state"\n{text}'
    )
    return file


def found_in(file: Path) -> list[Finding]:
    """The same of a config, without a process of its own."""
    who = account.account("root") if os.geteuid() == 0 else account.account(None)
    return asyncio.run(examine(Patient(loaded=parse.load(file), who=who, environ=os.environ), Gpus()))


def by_name(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in document["findings"]}


def test_the_host_alone_is_examined_without_a_config() -> None:
    document = doctor()
    found = by_name(document)
    assert document["config"] == ("/etc/mgpu-llm/mgpu-llm.toml" if Path("/etc/mgpu-llm/mgpu-llm.toml").exists() else "")
    assert {"driver-module", "memory-free", "memory-shm", "limits-files", "disks-space"} <= found.keys()
    if not Path("/dev/nvidiactl").exists():
        assert found["driver-module"]["level"] == "problem"
        assert found["driver-module"]["fix"]
    assert not [finding for finding in document["findings"] if "a fault of the doctor" in finding["seen"]]


def test_who_wants_no_gpus_is_told_nothing_of_drivers(tmp_path: Path) -> None:
    found = by_name(doctor("--config", str(config(tmp_path, 'gpus.use = "none"\n'))))
    assert found["driver-module"]["level"] == "ok"
    assert not {"gpus-present", "gpus-answer", "links-p2p", "driver-cuda"} & found.keys()
    assert {"model-weights", "ports-engine", "config", "engine-environment"} <= found.keys()


def test_what_the_driver_tells_of_the_configs_gpus_is_judged(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set(
        [FakeGpu(), FakeGpu(ecc_errors=2), FakeGpu(processes=((os.getpid(), 30 << 30),), used_bytes=30 << 30)],
        nvlinks=[(0, 1)],
    )
    file = config(tmp_path, "gpus.use = [1, 2]\n")
    found = by_name(doctor("--config", str(file), environ=nvml.environment()))
    assert found["gpus-present"]["seen"] == "GPUs 1, 2 of 3: NVIDIA H200"
    assert found["gpus-ecc"]["seen"].startswith("GPU 1: 2 memory errors")
    assert f"GPU 2: 30 GiB of 140 GiB taken, by pid {os.getpid()} (" in found["gpus-memory"]["seen"]
    assert "1 over PCI Express (1-2)" in found["links-p2p"]["seen"]
    assert "by NVML" in found["driver-module"]["seen"]


def test_problems_of_the_config_are_among_the_findings(tmp_path: Path) -> None:
    file = config(tmp_path, 'gpus.use = "none"\ngpus.tensor_paralel = 2\n')
    told = [finding for finding in found_in(file) if finding.name == "config"]
    assert any("tensor_paralel" in finding.seen and "tensor_parallel" in finding.fix for finding in told)


def test_a_config_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    (told,) = [finding for finding in found_in(tmp_path / "none.toml") if finding.name == "config"]
    assert told.level == "problem"


def test_a_user_that_there_is_not_is_a_wrong_command() -> None:
    with pytest.raises(CannotStartError) as refused:
        asyncio.run(questions.doctor(Path("none.toml"), "nobody-of-this-name"))
    assert refused.value.status == 2
    assert refused.value.message == (
        'cannot examine this host: there is no user "nobody-of-this-name"; see `getent passwd`'
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--doctor", "--check"],
        ["--doctor", "--plan", "unknown"],
        ["--user", "root"],
        ["--probe"],
        ["--doctor", "--force"],
    ],
)
def test_one_question_is_asked_at_a_time_and_whole(words: list[str]) -> None:
    assert CliRunner().invoke(main, words).exit_code == 2


def fails() -> Iterator[Finding]:
    yield SUBJECT.ok("first", "well")
    raise ZeroDivisionError("of three by nought")


def hangs() -> Iterable[Finding]:
    time.sleep(600)
    return []


def test_a_check_that_fails_or_hangs_is_a_finding_and_costs_no_other() -> None:
    checks = [
        Check(subject=SUBJECT, name="failing", work=fails),
        Check(subject=SUBJECT, name="hanging", work=hangs, limit_s=0.2),
        Check(subject=SUBJECT, name="fine", work=lambda: [SUBJECT.ok("fine", "well")]),
    ]

    async def all_of_them() -> list[list[Finding]]:
        return await asyncio.gather(*(examination.run(check) for check in checks))

    failing, hanging, fine = asyncio.run(all_of_them())
    assert [finding.seen for finding in failing + hanging] == [
        "not known: a fault of the doctor: ZeroDivisionError: of three by nought",
        "not known: no answer within 0.2 s",
    ]
    assert fine[0].level == "ok"


def test_what_the_config_gives_the_engine_counts_too(tmp_path: Path) -> None:
    file = config(tmp_path, 'gpus.use = "none"\nengine.env.LD_PRELOAD = "/lib/other.so"\n')
    (told,) = [finding for finding in found_in(file) if finding.name == "engine-environment"]
    assert "/lib/other.so" in told.seen


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_the_engines_python_is_run_as_its_user_and_never_as_root(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    python, ran = tmp_path / "python3", tmp_path / "ran"
    python.write_text(f"#!/bin/sh\nid -u >> {ran}\nexit 1\n")
    python.chmod(0o755)
    ran.write_text("")
    ran.chmod(0o666)
    file = config(tmp_path, 'gpus.use = "none"\n')
    file.write_text(file.read_text().replace(sys.executable, str(python)))
    who = account.account("nobody")
    asyncio.run(examine(Patient(loaded=parse.load(file), who=who, environ=os.environ), Gpus()))
    assert set(ran.read_text().split()) == {str(who.uid)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_an_environment_that_is_closed_to_the_engines_user_is_a_problem(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    python = closed / "python3"
    python.symlink_to(sys.executable)
    file = config(tmp_path, 'gpus.use = "none"\n')
    file.write_text(file.read_text().replace(f'"{sys.executable}"', f'"{python}"'))
    patient = Patient(loaded=parse.load(file), who=account.account("nobody"), environ=os.environ)
    (problem,) = [found for found in asyncio.run(examine(patient, Gpus())) if found.name == "engine-access"]
    assert (problem.level, problem.seen) == ("problem", f"nobody may not run {python}")
