from __future__ import annotations

from pathlib import Path

import pytest

from mgpu_llm.config.arguments import argument_problems
from mgpu_llm.config.problem import render
from tests.config.loading import loaded, unprivileged


def found(text: str) -> list[str]:
    result = loaded(text)
    assert result.problems == ()
    return render(argument_problems(result)).splitlines()


@pytest.mark.parametrize(
    ("argument", "option", "key"),
    [
        ("-tp", "--tensor-parallel-size", "gpus.tensor_parallel"),
        ("--tensor-parallel-size", "--tensor-parallel-size", "gpus.tensor_parallel"),
        ("--tensor_parallel_size=2", "--tensor-parallel-size", "gpus.tensor_parallel"),
        ("--gpu-memory-utilization=0.5", "--gpu-memory-utilization", "gpus.memory_utilisation"),
        ("--model", "--model", "model.path"),
        ("--device-ids=0", "--device-ids", "gpus.use"),
    ],
)
def test_an_option_with_a_key_of_its_own_names_the_key(argument: str, option: str, key: str) -> None:
    assert found(f"engine.args = ['{argument}', '2']") == [
        f"a.toml: engine.args: {option} has a key of its own here; remove it from the arguments and set {key}"
    ]


@pytest.mark.parametrize("option", ["--headless", "--grpc"])
def test_an_engine_without_the_api_could_never_be_ready(option: str) -> None:
    assert found(f"engine.args = ['{option}']") == [
        f"a.toml: engine.args: with {option} vLLM has no HTTP API, and the daemon could never see it ready; remove it"
    ]


def test_host_port_and_served_name_may_be_given_as_arguments() -> None:
    assert found("engine.args = ['--host', '::', '--port=81', '--served-model-name', 'a', '--seed', '1']") == []


def test_a_served_name_in_both_places_is_refused() -> None:
    assert found("model.served_name = 'a'\nengine.args = ['--served-model-name', 'b']") == [
        "a.toml: model.served_name: engine.args has --served-model-name already; keep one of them"
    ]


@pytest.mark.parametrize("port", ["0", "x", "65536", ""])
def test_a_port_argument_that_is_none_is_refused(port: str) -> None:
    assert found(f"engine.args = ['--port={port}']") == [
        f'a.toml: engine.args: found --port "{port}", expected a port from 1 to 65535'
    ]


def test_certificates_must_be_readable_and_complete(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("")
    assert found(f"engine.args = ['--ssl-keyfile', '{key}']") == [
        "a.toml: engine.args: found --ssl-keyfile alone, expected --ssl-certfile with it"
    ]
    assert found(f"engine.args = ['--ssl-keyfile', '{key}', '--ssl-certfile', '{key}']") == []
    assert found(f"engine.args = ['--ssl-certfile', '{tmp_path}/none.pem']") == [
        f'a.toml: engine.args: cannot read --ssl-certfile "{tmp_path}/none.pem": no such file or directory'
    ]
    key.chmod(0)
    with unprivileged():
        assert found(f"engine.args = ['--ssl-certfile', '{key}']") == [
            f'a.toml: engine.args: cannot read --ssl-certfile "{key}": permission denied'
        ]


def test_demanding_client_certificates_would_shut_the_probes_out() -> None:
    assert found("engine.args = ['--ssl-cert-reqs', '1']") == []
    assert found("engine.args = ['--ssl-cert-reqs', '2']") == [
        "a.toml: engine.args: --ssl-cert-reqs 2 demands a certificate of every client, and the daemon's probes have "
        "none; write 1, and let a proxy demand it"
    ]


def test_vllms_own_config_file_may_set_only_what_the_daemon_need_not_know(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    assert found(f"engine.args = ['--config', '{file}']") == [
        f'a.toml: engine.args: cannot read --config "{file}": no such file or directory'
    ]
    file.write_text("max-model-len: 4096\nseed: 1\n")
    assert found(f"engine.args = ['--config', '{file}']") == []
    file.write_text("max-model-len: 4096\napi_key: x\nport: 81\npipeline-parallel-size: 2\n")
    assert found(f"engine.args = ['--config={file}']") == [
        f'a.toml: engine.args: the daemon does not read --config "{file}", which sets --api-key, '
        "--pipeline-parallel-size, --port; move these to engine.args, or to their own keys here"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "engine.env.NOTIFY_SOCKET = '/x'",
            "engine.env.NOTIFY_SOCKET: NOTIFY_SOCKET belongs to the daemon; remove it",
        ),
        (
            "engine.env.CUDA_VISIBLE_DEVICES = '1'",
            "engine.env.CUDA_VISIBLE_DEVICES: CUDA_VISIBLE_DEVICES does not belong here; remove it and set gpus.use",
        ),
        (
            "ladder.rungs = [{ name = 'a', env = { VLLM_API_KEY = 'k' } }]",
            "ladder.rungs[0].env.VLLM_API_KEY: VLLM_API_KEY does not belong here; remove it and set it in [engine.env]",
        ),
        (
            "ladder.rungs = [{ name = 'a', args = ['-tp', '1'] }]",
            "ladder.rungs[0].args: --tensor-parallel-size has a key of its own here; remove it from the arguments and set gpus",
        ),
        (
            "ladder.rungs = [{ name = 'a', args = ['--gpu-memory-utilization=0.5'] }]",
            "ladder.rungs[0].args: --gpu-memory-utilization has a key of its own here; remove it from the arguments and "
            "set utilisation",
        ),
        (
            "ladder.rungs = [{ name = 'a', args = ['--port=81'] }]",
            "ladder.rungs[0].args: --port is the same on every rung; set it in engine.args",
        ),
    ],
)
def test_what_somebody_else_decides_is_refused(text: str, line: str) -> None:
    assert found(text) == [f"a.toml: {line}"]


def test_without_gpus_cuda_may_be_told_to_see_none() -> None:
    assert found("gpus.use = 'none'\nengine.env.CUDA_VISIBLE_DEVICES = ''") == []
