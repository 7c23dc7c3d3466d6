"""What does not fit this host, with the line an operator reads."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from mgpu_llm.config.checks import check
from mgpu_llm.config.parse import load
from tests.config.loading import checked, free_port, loaded, unprivileged
from tests.config.test_model import write_model

#: An engine that is there: the checks then speak of nothing else.
ENGINE = 'engine.command = ["/bin/sh"]\n'
HUB = "model.path = 'org/name'\n"
WANTED = 'expected the folder of a model, or a hub id such as "Qwen/Qwen3-8B"'
LLAMA = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4}


def test_a_config_that_fits_has_no_problems(tmp_path: Path) -> None:
    model = write_model(tmp_path, LLAMA)
    assert checked(f"{ENGINE}model.path = '{model}'\nengine.port = {free_port()}", engine_runs=False) == []


def test_a_model_must_be_set() -> None:
    assert checked(ENGINE) == [f"a.toml: model.path: found nothing, {WANTED}"]


@pytest.mark.parametrize("path", ["org/name", "Qwen/Qwen3-8B", "s3://bucket/model", "gs://b/m"])
def test_hub_ids_and_the_addresses_of_stores_are_left_to_vllm(path: str) -> None:
    assert checked(f"{ENGINE}model.path = '{path}'") == []


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("gpt2", f'found "gpt2", {WANTED}'),
        ("org/na me", f'found "org/na me", {WANTED}'),
        (
            "https://huggingface.co/Qwen/Qwen3-8B/tree/main",
            f'found the address "https://huggingface.co/Qwen/Qwen3-8B/tree/main", {WANTED}; write "Qwen/Qwen3-8B"',
        ),
        (
            "models/qwen/8b",
            'cannot read the model "models/qwen/8b": no such folder, and no hub id; '
            "write the absolute path of its folder",
        ),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_says_what_is_wanted(path: str, rest: str) -> None:
    assert checked(f"{ENGINE}model.path = '{path}'") == [f"a.toml: model.path: {rest}"]


def test_a_local_path_that_does_not_exist_says_so_and_offers_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "qwen3-8b").mkdir()
    (tmp_path / "other").mkdir()
    assert checked(f"{ENGINE}model.path = '{tmp_path}/qwen-8b'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}/qwen-8b": no such folder; '
        f'did you mean "{tmp_path}/qwen3-8b"?'
    ]
    assert checked(f"{ENGINE}model.path = '{tmp_path}/xyz/8b'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}/xyz/8b": no such folder'
    ]
    assert checked(f"{ENGINE}model.path = '{tmp_path}/zzzzz'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}/zzzzz": no such folder'
    ]


def test_a_file_is_no_model_unless_it_is_a_gguf(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.gguf"):
        (tmp_path / name).write_text("")
    assert checked(f"{ENGINE}model.path = '{tmp_path}/model.gguf'") == []
    assert checked(f"{ENGINE}model.path = '{tmp_path}/model.safetensors'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}/model.safetensors": it is a file; '
        "write the folder that it is in"
    ]


def test_a_folder_without_config_json_says_what_is_there(tmp_path: Path) -> None:
    start = f'a.toml: model.path: cannot read the model "{tmp_path}": no config.json in it,'
    text = f"{ENGINE}model.path = '{tmp_path}'"
    assert checked(text) == [f"{start} the folder is empty"]
    for name in (".git", "a", "b", "c", "d", "e", "f", "g"):
        (tmp_path / name).mkdir()
    assert checked(text) == [f'{start} it has "a", "b", "c", "d", "e", "f" and 2 more']
    write_model(tmp_path / "c", LLAMA)
    assert checked(text) == [f'{start} it has "a", "b", "c", "d", "e", "f" and 2 more; write "{tmp_path}/c"']


def test_a_folder_of_the_hubs_cache_leads_to_its_snapshot(tmp_path: Path) -> None:
    snapshot = write_model(tmp_path / "snapshots" / "abc", LLAMA)
    assert checked(f"{ENGINE}model.path = '{tmp_path}'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}": no config.json in it, it has "snapshots"; '
        f'write "{snapshot}"'
    ]


def test_a_config_json_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    start = f'a.toml: model.path: cannot read the model "{tmp_path}": its config.json:'
    text = f"{ENGINE}model.path = '{tmp_path}'"
    (tmp_path / "config.json").write_text('{\n"model_type" 1}')
    assert checked(text) == [f"{start} it is not JSON: expecting ':' delimiter in line 2; fetch the model anew"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("gone.json")
    assert checked(text) == [f"{start} no such file or directory"]
    assert checked(f"{text}\nengine.args = ['--hf-config-path', 'org/name']") == []


def test_a_broken_file_of_mistrals_format_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("[]")
    assert checked(f"{ENGINE}model.path = '{tmp_path}'") == [
        f'a.toml: model.path: cannot read the model "{tmp_path}": its params.json: it is JSON, but not an object; '
        "fetch the model anew"
    ]


def test_a_model_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", LLAMA)
    model.chmod(0)
    with unprivileged():
        lines = checked(f"{ENGINE}model.path = '{model}'")
    model.chmod(0o755)
    assert lines == [f'a.toml: model.path: cannot read the model "{model}": permission denied']


def test_an_engine_that_is_not_there_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert checked(HUB, {"PATH": str(tmp_path)}) == [
        "a.toml: engine.command: cannot find the engine: neither this Python nor the PATH has vllm; "
        "set engine.python to the Python of vLLM's environment"
    ]
    assert checked(f"{HUB}engine.command = ['/nowhere/vllm', 'serve']") == [
        'a.toml: engine.command: cannot find the engine: no such file "/nowhere/vllm"'
    ]
    assert checked(f"{HUB}engine.python = '/nowhere/python'") == [
        'a.toml: engine.python: cannot find the engine: no such file "/nowhere/python"'
    ]


def test_a_python_without_vllm_says_so_and_one_with_it_is_taken(tmp_path: Path) -> None:
    text = f"{HUB}engine.python = '{sys.executable}'\n"
    package = tmp_path / "with" / "vllm" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise RuntimeError('imported')")
    assert checked(f"{text}engine.env.PYTHONPATH = '{package.parents[1]}'") == []
    hidden = tmp_path / "without" / "vllm.py"
    hidden.parent.mkdir()
    python = hidden.parent / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    assert checked(f"{HUB}engine.python = '{python}'") == [
        f'a.toml: engine.python: cannot find the engine: "{python}" has no module vllm; '
        "write the Python of the environment that vLLM is in"
    ]


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 1\n", "#!/nowhere/interpreter\n"])
def test_a_python_that_cannot_be_asked_is_given_its_chance(tmp_path: Path, script: str) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    assert checked(f"{HUB}engine.python = '{python}'") == []


def test_a_port_in_use_is_found_under_the_key_that_says_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        by_key = checked(f"{ENGINE}{HUB}engine.port = {port}", engine_runs=False)
        by_argument = checked(f"{ENGINE}{HUB}engine.args = ['--port={port}']", engine_runs=False)
        assert [line.split(" (pid")[0].rsplit(": ", 1)[0] for line in (*by_key, *by_argument)] == [
            f'a.toml: engine.port: cannot listen on port {port} of "127.0.0.1"',
            f'a.toml: engine.args: cannot listen on port {port} of "127.0.0.1"',
        ]
        assert by_key[0].endswith(" has the port; free it, or set another")
        assert checked(f"{ENGINE}{HUB}engine.port = {port}", engine_runs=True) == []


def test_a_unix_socket_in_use_is_found_and_the_port_is_not_asked_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        path = tmp_path / "v.sock"
        port = server.getsockname()[1]
        text = f"{HUB}[engine]\ncommand = ['/bin/sh']\nport = {port}\nargs = ['--uds', '{path}']"
        assert checked(text, engine_runs=False) == []
        unix.bind(str(path))
        unix.listen()
        assert checked(text, engine_runs=False) == [
            f'a.toml: engine.args: cannot listen on --uds "{path}": somebody listens there already'
        ]


@pytest.mark.parametrize(
    ("text", "count", "rest"),
    [
        ("gpus.use = [0, 1, 2, 3]", None, ""),
        ("gpus = { use = [0, 1], tensor_parallel = 1 }", None, ""),
        ("gpus = { use = 'none', tensor_parallel = 2 }", None, ""),
        ("gpus.tensor_parallel = 64", None, ""),
        (
            "gpus = { use = [0, 1], tensor_parallel = 4 }",
            None,
            "found 4 ranks for 2 GPUs, expected one GPU for each rank; write 2",
        ),
        ("gpus.tensor_parallel = 4", 2, "found 4 ranks for 2 GPUs, expected one GPU for each rank; write 2"),
        (
            "gpus.use = [0, 1, 2, 3]\nengine.args = ['-pp', '2']",
            None,
            "found 4 x 2 (--pipeline-parallel-size) ranks for 4 GPUs, expected one GPU for each rank; write 2",
        ),
        (
            "gpus.use = [0]\nengine.args = ['-pp', '2', '-dp=3']",
            None,
            "found 1 x 2 (--pipeline-parallel-size) x 3 (--data-parallel-size) ranks for 1 GPUs, "
            "expected one GPU for each rank; use more GPUs",
        ),
        ("gpus = { use = [0], tensor_parallel = 2 }\nengine.args = ['--nnodes', '2']", None, ""),
        (
            "gpus = { use = [0], tensor_parallel = 2 }\nengine.args = ['--distributed-executor-backend', 'mp']",
            None,
            "found 2 ranks for 1 GPUs, expected one GPU for each rank; write 1",
        ),
        ("gpus = { use = [0, 1, 2, 3], tensor_parallel = 2 }\nengine.args = ['-pp', '2']", None, ""),
        ("gpus.use = ['MIG-ab']", None, ""),
        (
            "gpus = { use = ['MIG-ab'], tensor_parallel = 2 }",
            None,
            "found 2 ranks for 1 GPUs, expected one GPU for each rank; write 1",
        ),
        (
            "gpus.use = ['MIG-ab']\nengine.args = ['-pp', '2']",
            None,
            "found 1 x 2 (--pipeline-parallel-size) ranks for 1 GPUs, expected one GPU for each rank; "
            "CUDA shows an engine one MIG slice and nothing beside it",
        ),
    ],
)
def test_every_rank_needs_a_gpu_of_its_own(text: str, count: int | None, rest: str) -> None:
    lines = checked(f"{ENGINE}{HUB}{text}", gpu_count=count)
    assert lines == ([f"a.toml: gpus.tensor_parallel: {rest}"] if rest else [])


def test_all_gpus_of_a_host_without_any_says_how_to_do_without() -> None:
    assert checked(f"{ENGINE}{HUB}", gpu_count=0) == [
        'a.toml: gpus.use: found "all" on a host without GPUs, expected GPUs; write "none"'
    ]


@pytest.mark.parametrize(
    ("gpus", "count", "rest"),
    [
        ("tensor_parallel = 4", None, ""),
        ("tensor_parallel = 12", None, ""),
        ("tensor_parallel = 2", None, ""),
        ("use = 'all'", None, ""),
        ("use = 'all'", 4, ""),
        ("use = 'none'", None, ""),
        ("tensor_parallel = 8", None, "found 8, {}; write 4"),
        ("tensor_parallel = 3", None, "found 3, {}; write 2"),
        ("use = [0, 1, 2]", None, "found 3 (the number of GPUs), {}; write 2"),
        ("use = 'all'", 5, "found 5 (the number of GPUs), {}; write 4"),
    ],
)
def test_tensor_parallel_must_split_the_heads(tmp_path: Path, gpus: str, count: int | None, rest: str) -> None:
    model = write_model(tmp_path, LLAMA)
    splits = "expected a number that splits the model's 12 attention heads and 4 key/value heads"
    lines = checked(f"{ENGINE}model.path = '{model}'\ngpus = {{ {gpus} }}", gpu_count=count)
    assert lines == ([f"a.toml: gpus.tensor_parallel: {rest.format(splits)}"] if rest else [])


def test_unknown_key_value_heads_are_not_spoken_of(tmp_path: Path) -> None:
    model = write_model(tmp_path, {"model_type": "gpt2", "n_head": 12})
    assert checked(f"{ENGINE}model.path = '{model}'\ngpus.tensor_parallel = 5") == [
        "a.toml: gpus.tensor_parallel: found 5, expected a number that splits the model's 12 attention heads; write 4"
    ]


def test_the_size_to_write_fits_both_heads_and_gpus(tmp_path: Path) -> None:
    model = write_model(tmp_path, LLAMA)
    lines = checked(f"{ENGINE}model.path = '{model}'\ngpus = {{ use = [0, 1, 2], tensor_parallel = 5 }}")
    assert [line.rsplit("; ", 1)[1] for line in lines] == ["write 2", "write 2"]


def test_rungs_must_fit_the_gpus_and_the_heads(tmp_path: Path) -> None:
    model = write_model(tmp_path, LLAMA)
    lines = checked(f"""
        ladder.rungs = [{{ name = "a", gpus = 4 }}, {{ name = "b", gpus = 3 }}, {{ name = "c", gpus = 5 }},
                        {{ name = "d", utilisation = 0.5 }}]
        model.path = "{model}"
        gpus.use = [0, 1, 2, 3]
        {ENGINE}
    """)
    assert lines == [
        "a.toml: ladder.rungs[1].gpus: found 3, expected a number that splits the model's 12 attention heads and "
        "4 key/value heads; write 2",
        "a.toml: ladder.rungs[2].gpus: found 5, expected at most the 4 GPUs of gpus.use",
    ]


def test_the_arguments_are_checked_too() -> None:
    text = f"{HUB}[engine]\ncommand = ['{sys.executable}']\nargs = ['--headless']"
    assert [line.split(" vLLM ")[0] for line in checked(text)] == ["a.toml: engine.args: with --headless"]


def test_problems_of_the_text_and_of_the_host_come_together() -> None:
    lines = checked(f"{ENGINE}model.path = 'gpt2'\nstop.grce = 1")
    assert [line.split(": ")[1] for line in lines] == ["model.path", "stop.grce"]


def test_what_may_follow_from_a_known_problem_is_left_out() -> None:
    assert [line.split(": ")[1] for line in checked(f"{ENGINE}model.pth = '/m'")] == ["model.pth"]
    assert [line.split(": ")[1] for line in checked(f"{ENGINE}[modl]\npath = '/m'")] == ["modl"]


def test_where_no_engine_will_start_neither_it_nor_its_port_is_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = f"{HUB}[engine]\ncommand = ['/nowhere/vllm']\nport = {server.getsockname()[1]}"
        assert len(check(loaded(text), {})) == 2
        assert check(loaded(text), {}, engine_starts=False) == ()


def test_with_a_file_missing_the_host_is_not_asked(tmp_path: Path) -> None:
    missing = load(tmp_path / "none.toml")
    assert check(missing, {}) == missing.problems
