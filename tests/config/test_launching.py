from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mgpu_llm.config.launching import (
    command_as_written,
    engine_command,
    own_python_has_vllm,
    to_base_launch,
    to_patience,
    to_server,
)
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.launch import Launch, argv
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from tests.config.loading import config, unprivileged

MODULE = ("-m", "vllm.entrypoints.cli.main", "serve")


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without vLLM, whatever the tests run in."""
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_a_command_is_taken_as_it_is_with_its_program_found(tmp_path: Path) -> None:
    vllm = program(tmp_path / "vllm")
    named = config('engine.command = ["vllm", "serve", "-v"]').engine
    assert engine_command(named, {"PATH": str(tmp_path)}) == (str(vllm), "serve", "-v")
    absolute = config(f'engine.command = ["{vllm}", "serve"]').engine
    assert engine_command(absolute, {}) == (str(vllm), "serve")


def test_a_program_is_looked_for_in_the_engines_path(tmp_path: Path) -> None:
    vllm = program(tmp_path / "vllm")
    engine = config(f'engine.command = ["vllm"]\nengine.env.PATH = "{tmp_path}"').engine
    assert engine_command(engine, {"PATH": "/nowhere"}) == (str(vllm),)


def test_a_python_runs_vllm_as_a_module_and_its_link_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert engine_command(config(f'engine.python = "{python}"').engine, {}) == (str(python), *MODULE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engine_command(config('engine.python = "~/bin/python"').engine, {}) == (str(python), *MODULE)


def test_without_either_the_daemons_own_environment_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    package = tmp_path / "vllm" / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert engine_command(config("").engine, {}) == (sys.executable, *MODULE)


def test_a_bare_folder_of_the_name_is_no_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "vllm").mkdir()
    assert not own_python_has_vllm()


@pytest.mark.usefixtures("no_vllm")
def test_then_comes_the_path_and_then_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^neither this Python nor the PATH has vllm$"):
        engine_command(config("").engine, {"PATH": str(tmp_path)})
    vllm = program(tmp_path / "vllm")
    assert engine_command(config("").engine, {"PATH": str(tmp_path)}) == (str(vllm), "serve")


def test_a_program_that_is_none_says_why(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for name, error in {
        "vlm": f'no program "vlm" on the PATH "{tmp_path}"',
        "~nobody-of-this-name/python": 'no such file "~nobody-of-this-name/python"',
        f"{tmp_path}/vlm": f'no such file "{tmp_path}/vlm"',
        f"{tmp_path}": f'"{tmp_path}" is a folder',
        f"{plain}": f'"{plain}" is not executable',
    }.items():
        with pytest.raises(OSError) as caught:
            engine_command(config(f'engine.python = "{name}"').engine, {"PATH": str(tmp_path)})
        assert str(caught.value) == error


def test_a_command_whose_engine_may_be_elsewhere_is_as_it_is_written() -> None:
    assert command_as_written(config('engine.command = ["vllm", "serve", "-v"]').engine) == ("vllm", "serve", "-v")
    assert command_as_written(config('engine.python = "/opt/python"').engine) == ("/opt/python", *MODULE)
    assert command_as_written(config("").engine) == ("vllm", "serve")


def test_a_program_in_a_folder_that_may_not_be_searched_says_so(tmp_path: Path) -> None:
    vllm = program(tmp_path / "closed" / "vllm")
    vllm.parent.chmod(0)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        engine_command(config(f'engine.command = ["{vllm}"]').engine, {})
    vllm.parent.chmod(0o755)
    assert str(caught.value) == f'"{vllm}" is in a folder that this user may not search'


def test_the_server_and_the_base_launch_make_the_command_line(tmp_path: Path) -> None:
    vllm = program(tmp_path / "vllm")
    settings = config(f"""
        model = {{ path = "org/name", served_name = "m" }}
        engine = {{ command = ["{vllm}", "serve"], port = 81, args = ["--seed", "1"], env = {{ A = "1" }} }}
        gpus = {{ use = [2, 3], memory_utilisation = 0.8 }}
    """)
    launch = to_base_launch(settings, ("GPU-a", "GPU-b"))
    assert launch == Launch(
        gpus=("GPU-a", "GPU-b"), tensor_parallel=2, utilisation=0.8, env={"A": "1"}, args=("--seed", "1")
    )
    assert " ".join(argv(to_server(settings, engine_command(settings.engine, {})), launch)) == (
        f"{vllm} serve org/name --tensor-parallel-size 2 --gpu-memory-utilization 0.8 --served-model-name m "
        "--host 127.0.0.1 --port 81 --seed 1"
    )


def test_what_the_arguments_give_is_not_given_twice(tmp_path: Path) -> None:
    vllm = program(tmp_path / "vllm")
    server = to_server(
        config(f"""
            model.path = "{tmp_path}/m"
            engine.command = ["{vllm}"]
            engine.args = ["--host=::", "--port", "81", "--served_model_name", "a"]
        """),
        (str(vllm),),
    )
    assert (server.model, server.host, server.port, server.served_name) == (f"{tmp_path}/m", None, None, "")


def test_a_relative_model_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(f"model.path = './m'\nengine.python = '{sys.executable}'")
    assert to_server(settings, engine_command(settings.engine, {})).model == f"{tmp_path}/m"


def test_without_gpus_one_rank_is_the_default_and_no_utilisation_is_set() -> None:
    assert to_base_launch(config("gpus.use = 'none'"), None) == Launch(gpus=None, tensor_parallel=1, utilisation=None)
    assert to_base_launch(config("gpus = { use = 'none', tensor_parallel = 2 }"), None).tensor_parallel == 2


def test_patience_is_by_phase() -> None:
    assert to_patience(config("")) == DEFAULT_PATIENCE_S
    assert to_patience(config("patience.distributed_init = 7"))[Phase.DISTRIBUTED_INIT] == 7
