"""Each mistake of an operator: one clear line that names the fix, exit 78, and no engine, with and without --check."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.daemon.conftest import Begin
from tests.daemon.lives import LIMIT_S
from tests.support.daemons import MGPUD
from tests.support.fake_nvml import FakeGpu, FakeNvml
from tests.support.fake_setup import FakeSetup
from tests.support.read_only import inside, needs_mounts

#: Settings, further TOML, and the whole line after the file's name.
MISTAKES: Final[Mapping[str, tuple[Mapping[str, object], str, str]]] = {
    "an unknown key": (
        {"engine.prot": 8000},
        "",
        r"engine\.prot: found an unknown key, expected one of .*port.*; did you mean engine\.port\?",
    ),
    "an unknown table": ({"gpu.use": "all"}, "", r"gpu: found an unknown key, expected one of .*; did you mean gpus\?"),
    "a wrong type": (
        {"engine.port": "8000"},
        "",
        r'engine\.port: found "8000" \(string\), expected an integer from 1 to 65535; write 8000',
    ),
    "heads that do not split": (
        {"gpus.tensor_parallel": 3},
        "",
        r"gpus\.tensor_parallel: found 3, expected a number that splits the model's 4 attention heads "
        r"and 2 key/value heads; write 2",
    ),
    "two rungs of one name": (
        {},
        '[[ladder.rungs]]\nname = "a"\ngpus = 1\n[[ladder.rungs]]\nname = "a"\nutilisation = 0.5\n',
        r'ladder\.rungs: two rungs are named "a"; give each rung a name of its own',
    ),
    "the ladder of an older version": (
        {},
        '[[ladder]]\nname = "a"\ngpus = 1\n',
        r"ladder: found \[\{\.\.\.\}\] \(array\), expected a table; write \[\[ladder\.rungs\]\]",
    ),
    "an engine that is not there": (
        {"engine.command": ["/opt/nowhere/vllm", "serve"]},
        "",
        r'engine\.command: cannot find the engine: no such file "/opt/nowhere/vllm"',
    ),
    "a folder without config.json": (
        {"model.path": "/proc/self/task"},
        "",
        r'model\.path: cannot read the model "/proc/self/task": no config\.json in it, it has .*',
    ),
    "a model that is not there": (
        {"model.path": "/nowhere/model"},
        "",
        r'model\.path: cannot read the model "/nowhere/model": no such folder',
    ),
    "TOML that is none": ({}, "[[ladder\n", r"cannot read it as TOML: .* \(at line \d+, column \d+\)"),
}


def refused(
    setup: FakeSetup, environ: Mapping[str, str] | None = None, ways: tuple[str, ...] = ("run", "check")
) -> dict[str, tuple[int, str]]:
    """What mgpud and mgpud --check say to a setup, side by side: exit status and stderr. No engine is ever begun."""
    begun = setup.folder / "begun"
    command = setup.settings.get("engine.command", ["/bin/sh", "-c", f'touch "{begun}"'])
    spied = FakeSetup(
        folder=setup.folder,
        port=setup.port,
        settings={**setup.settings, "engine.command": command},
        tables=setup.tables,
    )
    file = spied.write()
    processes = {
        way: subprocess.Popen(
            [MGPUD, "--config", file, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
        )
        for way, options in {"run": (), "check": ("--check",)}.items()
        if way in ways
    }
    said = dict[str, tuple[int, str]]()
    try:
        for way, process in processes.items():
            out, err = process.communicate(timeout=LIMIT_S)
            assert out == ""
            said[way] = (process.returncode, err)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert not begun.exists()
    return said


def one_line(
    setup: FakeSetup,
    pattern: str,
    environ: Mapping[str, str] | None = None,
    status: int = 78,
    ways: tuple[str, ...] = ("run", "check"),
) -> None:
    for code, told in refused(setup, environ, ways).values():
        assert code == status, told
        assert re.fullmatch(f"{pattern}\n", told), told


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_is_refused_with_one_line(tmp_path: Path, mistake: str) -> None:
    settings, tables, pattern = MISTAKES[mistake]
    setup = FakeSetup(folder=tmp_path, settings=settings, tables=tables)
    one_line(setup, f"{re.escape(str(setup.config_file))}: {pattern}")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    settings: dict[str, object] = {"engine.prot": 1, "model.path": "/nowhere/model", "gpus.memory_utilisation": 9}
    setup = FakeSetup(folder=tmp_path, settings=settings)
    for code, told in refused(setup).values():
        assert code == 78
        keys = [line.removeprefix(f"{setup.config_file}: ").partition(":")[0] for line in told.splitlines()]
        assert keys == ["engine.prot", "gpus.memory_utilisation", "model.path"]


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    setup = FakeSetup(folder=tmp_path)
    drop_in = tmp_path / "conf.d/10-site.toml"
    drop_in.parent.mkdir()
    drop_in.symlink_to(tmp_path / "nowhere")
    one_line(setup, f"{re.escape(str(drop_in))}: cannot read it: no such file; remove the dangling link")
    drop_in.unlink()
    drop_in.write_bytes(b'[model]\nserved_name = "\xe4"\n')
    one_line(setup, f"{re.escape(str(drop_in))}: cannot read it: byte 0xe4 in line 2 is not UTF-8; save it as UTF-8")


def test_a_config_file_that_is_not_there_says_where_to_take_one_from(tmp_path: Path) -> None:
    done = subprocess.run([MGPUD, "--config", tmp_path / "no.toml"], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 78
    assert done.stderr == f"{tmp_path}/no.toml: cannot read it: no such file; copy etc/mgpu-llm.toml there\n"


def test_a_port_that_another_program_has_is_named_with_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        # A check leaves the port out while a daemon holds the runtime folder, so that the two must not run at once.
        setup = FakeSetup(folder=tmp_path, port=other.getsockname()[1])
        place = f"{re.escape(str(setup.config_file))}: engine\\.port: "
        what = rf'cannot listen on port {setup.port} of "127\.0\.0\.1": \S+ \(pid {os.getpid()}\) has the port'
        for way in (("run",), ("check",)):
            one_line(setup, f"{place}{what}; free it, or set another", ways=way)


def test_a_runtime_folder_that_cannot_be_used_is_refused(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    life = begin(settings={"daemon.runtime_dir": f"{tmp_path}/file/run"})
    assert life.ended() == 78
    assert life.log() == (
        f"cannot use the runtime folder '{tmp_path}/file/run': Not a directory; set daemon.runtime_dir\n"
    )


@needs_mounts
def test_a_runtime_folder_that_the_unit_makes_read_only_is_refused_with_what_opens_it(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    setup = FakeSetup(folder=tmp_path, settings={"daemon.runtime_dir": f"{closed}/run"})
    command = inside(closed, str(MGPUD), "--config", str(setup.write()))
    environ = {**os.environ, "INVOCATION_ID": "8b5f"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 78
    place = f"'{closed}/run': Read-only file system; set daemon.runtime_dir, or, where its unit makes that read-only"
    assert done.stderr.startswith(
        f"cannot use the runtime folder {place} (the folder must be there): sudo systemctl edit "
    )
    assert done.stderr.endswith(f": ReadWritePaths={closed}/run under [Service]\n")


@pytest.mark.parametrize(
    ("use", "pattern"),
    [
        ([1, 5], r"gpus\.use: no GPU 5: this host has 0-1 \(2 x NVIDIA H200\)"),
        (["GPU-0badbadb", 1], r'gpus\.use: no GPU "GPU-0badbadb": this host has 0-1 \(2 x NVIDIA H200\)'),
        ([0], r"gpus\.tensor_parallel: found 2 ranks for 1 GPUs, expected one GPU for each rank; write 1"),
    ],
)
def test_gpus_that_the_host_does_not_have_are_refused(
    tmp_path: Path, nvml: FakeNvml, use: list[object], pattern: str
) -> None:
    nvml.set([FakeGpu(), FakeGpu()])
    setup = FakeSetup(folder=tmp_path, settings={"gpus.use": use})
    one_line(setup, f"{re.escape(str(setup.config_file))}: {pattern}", nvml.environment())


def test_all_gpus_of_a_host_without_any_are_refused(tmp_path: Path, nvml: FakeNvml) -> None:
    nvml.set([])
    setup = FakeSetup(folder=tmp_path, settings={"gpus.use": "all", "gpus.tensor_parallel": None})
    pattern = r'gpus\.use: found "all" on a host without GPUs, expected GPUs; write "none"'
    one_line(setup, f"{re.escape(str(setup.config_file))}: {pattern}", nvml.environment())


def test_a_driver_that_is_absent_is_worth_another_try_and_named(tmp_path: Path, nvml: FakeNvml) -> None:
    setup = FakeSetup(folder=tmp_path, settings={"gpus.use": [0, 1]})
    pattern = (
        r'cannot .*Driver Not Loaded.*; load the driver \("modprobe nvidia"\) '
        r'\(an engine without GPUs needs gpus\.use = "none"\)'
    )
    one_line(setup, pattern, nvml.environment(), status=75)


def test_a_check_of_a_config_whose_daemon_runs_finds_no_problem_and_disturbs_nothing(begin: Begin) -> None:
    life = begin()
    pid = life.ready()["pid"]
    done = subprocess.run(
        [MGPUD, "--config", life.setup.config_file, "--check"], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{life.setup.config_file}: no problems; for a cause that nobody knows the ladder has 3 rungs:\n"
        "  base: as configured\n"
        "  p2p-off: NCCL_P2P_DISABLE=1; --disable-custom-all-reduce\n"
        "  p2p-off+tp-1: NCCL_P2P_DISABLE=1; --disable-custom-all-reduce; --tensor-parallel-size 2 -> 1\n"
    )
    assert life.status()["pid"] == pid
    assert life.stop() == 0
