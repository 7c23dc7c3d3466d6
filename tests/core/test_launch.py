from __future__ import annotations

import pytest

from mgpu_llm.core.launch import WITHHELD, Launch, Server, argv, differences, environment, shown, with_changes
from tests.core.world import BASE, ON_CPU

ONE_GPU = with_changes(BASE, gpus=("GPU-a",), tensor_parallel=1)
SERVER = Server(command=("/opt/vllm/bin/vllm", "serve"), model="/models/m7b", served_name="m7b")


def test_the_command_line_says_everything_that_was_decided_and_ends_with_the_admins_arguments() -> None:
    assert argv(SERVER, Launch(gpus=("0", "1"), tensor_parallel=2, utilisation=0.85, args=("--enforce-eager",))) == (
        "/opt/vllm/bin/vllm", "serve", "/models/m7b", "--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.85",
        "--served-model-name", "m7b", "--host", "127.0.0.1", "--port", "8000", "--enforce-eager",
    )  # fmt: skip


def test_what_was_not_decided_is_left_to_vllm() -> None:
    bare = Server(command=("vllm", "serve"), model="m", host=None, port=None)
    assert argv(bare, ON_CPU) == ("vllm", "serve", "m", "--tensor-parallel-size", "2")


def test_the_engine_never_gets_what_belongs_to_the_daemon() -> None:
    inherited = dict.fromkeys(WITHHELD, "x") | {"PATH": "/bin", "HF_HOME": "/cache"}
    assert environment(inherited, ON_CPU) == {"PATH": "/bin", "HF_HOME": "/cache", "PYTHONUNBUFFERED": "1"}
    assert "NOTIFY_SOCKET" in WITHHELD


def test_gpus_are_numbered_by_their_pci_address_and_narrowed_to_those_of_the_launch() -> None:
    env = environment({"CUDA_VISIBLE_DEVICES": "7", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, BASE)
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"


def test_a_launch_without_gpus_leaves_the_environments_own_choice_alone() -> None:
    assert environment({"CUDA_VISIBLE_DEVICES": "7"}, ON_CPU)["CUDA_VISIBLE_DEVICES"] == "7"


def test_the_environment_of_the_launch_overrides_the_inherited_one() -> None:
    launch = with_changes(ON_CPU, env={"NCCL_P2P_DISABLE": "1"})
    assert environment({"NCCL_P2P_DISABLE": "0"}, launch)["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("base", "launch", "told"),
    [
        (BASE, BASE, ()),
        (BASE, with_changes(BASE, env={"A": "1"}), ("A=1",)),
        (with_changes(BASE, env={"A": "1"}), BASE, ("A unset",)),
        (with_changes(BASE, env={"A": "1"}), with_changes(BASE, env={"A": "2"}), ("A=2",)),
        (BASE, with_changes(BASE, args=("--x", "1")), ("--x 1",)),
        (with_changes(BASE, args=("--a",)), with_changes(BASE, args=("--a", "--b")), ("--b",)),
        (with_changes(BASE, args=("--a",)), with_changes(BASE, args=("--b",)), ("--b",)),
        (BASE, with_changes(BASE, utilisation=0.85), ("--gpu-memory-utilization 0.9 -> 0.85",)),
        (ON_CPU, with_changes(ON_CPU, utilisation=0.5), ("--gpu-memory-utilization default -> 0.5",)),
        (
            BASE,
            ONE_GPU,
            ("GPUs GPU-a,GPU-b -> GPU-a", "--tensor-parallel-size 2 -> 1"),
        ),
        (ON_CPU, with_changes(ON_CPU, tensor_parallel=1), ("--tensor-parallel-size 2 -> 1",)),
        (ON_CPU, BASE, ("--gpu-memory-utilization default -> 0.9", "GPUs  -> GPU-a,GPU-b")),
    ],
)
def test_each_difference_is_told_once_and_readably(base: Launch, launch: Launch, told: tuple[str, ...]) -> None:
    assert differences(base, launch) == told


def test_an_argument_that_the_admin_gave_already_is_not_given_twice() -> None:
    given = with_changes(BASE, args=("--a", "--disable-custom-all-reduce", "--b"))
    assert with_changes(given, args=("--disable-custom-all-reduce",)) == given
    assert with_changes(given, args=("--b", "--a")).args == (*given.args, "--b", "--a")


def test_no_changes_change_nothing() -> None:
    assert with_changes(BASE) == BASE


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("vllm", "serve", "/models/m 7b", "--port", "80"), "vllm serve '/models/m 7b' --port 80"),
        (("vllm", "--api-key", "k3y", "--port", "80"), "vllm --api-key ... --port 80"),
        (("vllm", "--api_key=k3y", "--hf-token", "k3y"), "vllm --api_key=... --hf-token ..."),
        (("vllm", "--api-key", "--port", "80"), "vllm --api-key --port 80"),
        (("vllm", "--api-key", "k3y", "k4y", "k5y", "--port", "80"), "vllm --api-key ... ... ... --port 80"),
        (("vllm", "--api-key=k3y", "k4y", "--port=80"), "vllm --api-key=... ... --port=80"),
        (("vllm", "--hf-token=k3y=", "--hf-token"), "vllm --hf-token=... --hf-token"),
        (("vllm", "--API_KEY", "k3y", "-hf_token", "k3y"), "vllm --API_KEY ... -hf_token ..."),
        (
            ("vllm", "--ssl-keyfile-password", "k3y", "--client-secret=k3y"),
            "vllm --ssl-keyfile-password ... --client-secret=...",
        ),
        (("vllm", "--api-key="), "vllm --api-key="),
        (("vllm", "--ssl-keyfile", "/k.pem", "--token-limit", "5"), "vllm --ssl-keyfile /k.pem --token-limit 5"),
        (
            ("vllm", "--max-num-batched-tokens", "8192", "--tokenizer=x"),
            "vllm --max-num-batched-tokens 8192 --tokenizer=x",
        ),
    ],
)
def test_a_command_line_is_shown_without_its_secrets(command: tuple[str, ...], told: str) -> None:
    assert shown(command) == told


def test_changes_are_told_without_their_secrets() -> None:
    base = Launch(gpus=None, tensor_parallel=1, utilisation=None)
    env = {"HF_TOKEN": "hf_abc", "AWS_SECRET_ACCESS_KEY": "s3", "TOKENIZERS_PARALLELISM": "false"}
    changed = with_changes(base, env=env, args=("--api-key", "k3y"))
    secrets = ("HF_TOKEN=...", "AWS_SECRET_ACCESS_KEY=...")
    assert differences(base, changed) == (*secrets, "TOKENIZERS_PARALLELISM=false", "--api-key ...")
