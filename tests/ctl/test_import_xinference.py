"""What an `xinference launch` becomes: settings, and what could not be carried over."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mgpu_llm.xinference.model import find
from mgpu_llm.xinference.tables import Model, models
from tests.ctl.launches import MANY, QWEN, SEED, args, config, lost, problems, remarks, toml


def test_the_command_of_the_first_report_becomes_the_same_settings() -> None:
    assert config(SEED) == {
        "model": {"path": "Qwen/Qwen2.5-72B-Instruct", "served_name": "qwen2.5-instruct"},
        "engine": {"args": ["--trust-remote-code"]},
        "gpus": {"use": [2, 3], "memory_utilisation": 0.95},
    }
    assert lost(SEED) == []


@pytest.mark.parametrize("command", MANY)
def test_every_config_loads_and_passes_the_checks(command: str) -> None:
    assert problems(toml(command)) == []


@pytest.mark.parametrize("command", MANY)
def test_every_key_has_a_comment_that_says_where_it_came_from(command: str) -> None:
    lines = toml(command).splitlines()
    for before, line in pairwise(lines):
        key = line.split(" = ")[0]
        if " = " in line and not line.startswith(("#", " ")) and key != "args":
            assert before.startswith("# ") or "  # " in line, line


def test_a_fraction_above_nine_tenths_is_kept_and_called_unsafe() -> None:
    assert any("0.90 is safer" in line for line in remarks(SEED))
    assert "0.90 is safer" in toml(SEED)
    assert "0.90 is safer" not in toml(f"{QWEN} --gpu_memory_utilization 0.8")


@pytest.mark.parametrize(
    ("options", "use"),
    [
        ("", [0]),
        ("--n-gpu auto", [0]),
        ("--n-gpu 4", [0, 1, 2, 3]),
        ("--n-gpu None", "none"),
        ("--gpu-idx 2,3", [2, 3]),
        ("--gpu-idx 2,3 --n-gpu 1", [2, 3]),
        ("--gpu-idx 3,2,3", [3, 2]),
        ("--gpu-idx 0,1,2,3 -r 2", [0, 2]),
        ("--tensor_parallel_size 4", [0, 1, 2, 3]),
    ],
)
def test_the_gpus_are_those_that_xinference_would_take(options: str, use: object) -> None:
    assert config(f"{QWEN} {options}")["gpus"]["use"] == use


@pytest.mark.parametrize(
    ("visible", "options", "use"),
    [
        ("2,3", "", [2, 3]),
        ("2,3", "--n-gpu 1", [2]),
        ("2,3", "--n-gpu 4", [2, 3]),
        ("2,3", "--gpu-idx 3", [3]),
        ("2,3", "--gpu-idx 5", [5]),
        ("-1", "", "none"),
        ("all", "", [0]),
        ("GPU-5e0c,GPU-aa", "", ["GPU-5e0c", "GPU-aa"]),
        ("MIG-5e0c", "", [0]),
    ],
)
def test_visible_devices_before_the_command_choose_the_gpus(visible: str, options: str, use: object) -> None:
    assert config(f"CUDA_VISIBLE_DEVICES={visible} {QWEN} {options}")["gpus"]["use"] == use


def test_gpus_outside_the_visible_ones_are_spoken_of() -> None:
    assert lost(f"CUDA_VISIBLE_DEVICES=2,3 {QWEN} --gpu-idx 5") == ["CUDA_VISIBLE_DEVICES=2,3"]


@pytest.mark.parametrize(
    ("options", "parallel", "left"),
    [
        ("--n-gpu 4 --tensor_parallel_size 4", None, []),
        ("--n-gpu 4 --tensor-parallel-size 2", 2, []),
        ("--n-gpu 4 --tensor_parallel_size 8", None, ["--tensor_parallel_size 8"]),
        ("--n-gpu 4 --pipeline_parallel_size 2", 2, []),
        ("--n-gpu 3 --pipeline_parallel_size 2", None, ["--pipeline_parallel_size 2"]),
        ("--n-gpu 2 --tensor_parallel_size two", None, ["--tensor_parallel_size two"]),
    ],
)
def test_there_is_a_gpu_for_every_rank(options: str, parallel: int | None, left: list[str]) -> None:
    assert config(f"{QWEN} {options}")["gpus"].get("tensor_parallel") == parallel
    assert lost(f"{QWEN} {options}") == left


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--max_model_len 8192", ("--max-model-len", "8192")),
        ("--max-model-len=8192", ("--max-model-len", "8192")),
        ("--enforce_eager True", ("--enforce-eager",)),
        ("--enforce-eager", ("--enforce-eager",)),
        ("--enforce_eager False", ()),
        ("--enable_prefix_caching False", ("--no-enable-prefix-caching",)),
        ("--enable_prefix_caching true", ("--enable-prefix-caching",)),
        ("--model_quantization fp8", ("--quantization", "fp8")),
        ("--max_model_len None", ()),
        ("--seed -1", ("--seed=-1",)),
        ("--max_model_len 1 --max-model-len 2", ("--max-model-len", "2")),
        ("-lm b /b --lora-modules a=/a", ("--enable-lora", "--lora-modules", "a=/a", "b=/b", "--max-loras", "2")),
    ],
)
def test_what_xinference_hands_to_vllm_becomes_vllms_own_options(options: str, expected: tuple[str, ...]) -> None:
    assert args(f"{QWEN} --trust-remote-code false {options}") == expected


@pytest.mark.parametrize("value", ["", "--trust-remote-code True", "--trust_remote_code yes"])
def test_models_may_bring_code_unless_xinference_was_told_not_to(value: str) -> None:
    assert args(f"{QWEN} {value}") == ("--trust-remote-code",)


@pytest.mark.parametrize(
    "option",
    [
        "--replica 2",
        "--n-worker 2",
        "--worker-ip 10.0.0.1",
        "--endpoint http://10.0.0.1:9997",
        "--model-engine transformers",
        "--image-lora-load-kwargs a",
        "--reasoning_content True",
        "--request_limits 3",
        "--download_hub modelscope",
        "--enable_xavier True",
        "--served_model_name x",
        "--host 0.0.0.0",
        "--frobnicate 3",
        "--enforce_eager perhaps",
        "--max_model_len",
        "--gpu_memory_utilization",
        "--gpu_memory_utilization 1.5",
        "--n-gpu many",
        "--gpu-idx a,b",
        "--replica two",
    ],
)
def test_an_option_that_cannot_be_carried_over_is_named_with_the_reason(option: str) -> None:
    command = f"{QWEN} {option}" + (" b" if "image" in option else "")
    assert lost(command) == [option]
    assert any(line.startswith(f"not carried over: {option}: ") for line in remarks(command))


def test_a_mistyped_option_of_vllm_gets_a_hint() -> None:
    assert any("did you mean --max_model_len?" in line for line in remarks(f"{QWEN} --max_model_length 8192"))


def test_an_option_that_newer_vllm_lost_is_carried_over_with_a_remark() -> None:
    assert args(f"{QWEN} --swap_space 8 --trust-remote-code 0") == ("--swap-space", "8")
    assert any("--swap-space is an option of vLLM 0.8.4" in line for line in remarks(f"{QWEN} --swap_space 8"))


def test_defaults_that_were_written_out_are_listed_and_not_repeated() -> None:
    command = f"{QWEN} --gpu_memory_utilization 0.90 --n-worker 1 --replica 1 -t LLM"
    assert "memory_utilisation" not in config(command)["gpus"]
    assert lost(command) == []
    expected = "# Asked for, and so already: --gpu_memory_utilization 0.90; --n-worker 1; --replica 1; -en vllm; -t LLM"
    assert toml(command).endswith(expected)


@pytest.mark.parametrize(
    ("words", "hub_id"),
    [
        (("qwen2.5-instruct", "72", "", ""), "Qwen/Qwen2.5-72B-Instruct"),
        (("qwen2.5-instruct", "72", "gptq", "int8"), "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8"),
        (("qwen2.5-instruct", "0_5", "pytorch", "none"), "Qwen/Qwen2.5-0.5B-Instruct"),
        (("qwen2.5-instruct", "0.5", "AWQ", ""), "Qwen/Qwen2.5-0.5B-Instruct-AWQ"),
        (("llama-3.1-instruct", "8", "pytorch", ""), "meta-llama/Meta-Llama-3.1-8B-Instruct"),
    ],
)
def test_the_table_names_the_repository_that_xinference_takes(words: tuple[str, str, str, str], hub_id: str) -> None:
    found = find(*words)
    assert isinstance(found, Model)
    assert found.hub_id == hub_id


def test_every_row_of_the_table_is_found_by_its_own_names_and_passes_the_checks() -> None:
    for model in models():
        assert find(*model[:4]) == model
    hub_ids = sorted({model.hub_id for model in models()})
    assert [hub_id for hub_id in hub_ids if problems(f"model.path = '{hub_id}'")] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("qwen2.5-instrukt", "72", "", ""), "did you mean 'qwen2.5-instruct'?"),
        (("my-own", "", "", ""), "is named 'my-own'"),
        (("qwen2.5-instruct", "71", "", ""), "has 'qwen2.5-instruct' for vLLM only as "),
        (("qwen2.5-instruct", "72", "ggufv2", ""), "72 awq Int4"),
        (("qwen2.5-instruct", "72", "pytorch", "4-bit"), "72 pytorch none"),
    ],
)
def test_a_model_that_the_table_lacks_leaves_the_path_empty_and_says_what_there_is(
    words: tuple[str, str, str, str], says: str
) -> None:
    found = find(*words)
    assert isinstance(found, str)
    assert says in found
    name, size, kind, quantization = (
        f"{option} {word}" if word else "" for option, word in zip(_SHORT, words, strict=True)
    )
    command = f"xinference launch -en vllm {name} {size} {kind} {quantization}"
    assert config(command)["model"]["path"] == ""
    assert any(says in line and line.endswith("into model.path") for line in remarks(command))


_SHORT = ("-n", "-s", "-f", "-q")


@pytest.mark.parametrize(
    ("path", "becomes", "says"),
    [
        ("/models/q", "/models/q", ""),
        ("s3://bucket/q", "s3://bucket/q", ""),
        ("models/q", "./models/q", "absolute path"),
        ("~/models/q", "~/models/q", "absolute path"),
        ("$HOME/q", "$HOME/q", "only the shell knows"),
    ],
)
def test_a_models_own_path_goes_before_its_name(path: str, becomes: str, says: str) -> None:
    assert config(f"{QWEN} -mp '{path}'")["model"]["path"] == becomes
    assert any(says in line for line in remarks(f"{QWEN} --model-path '{path}'") if "model.path" in line) or not says


def test_what_xinference_has_fetched_already_is_pointed_at() -> None:
    assert any("/data/cache/qwen2_5-instruct-pytorch-72b;" in line for line in remarks(f"XINFERENCE_HOME=/data {QWEN}"))
    assert any("~/.xinference/cache/qwen2_5-instruct-gptq-72b-Int4;" in line for line in remarks(f"{QWEN} -f gptq"))
