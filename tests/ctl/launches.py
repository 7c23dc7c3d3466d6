"""Commands that people launch models with, and ways to look at what is made of them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgpu_llm.config.checks import check
from mgpu_llm.config.files import Source
from mgpu_llm.config.parse import parse
from mgpu_llm.config.problem import render
from mgpu_llm.xinference import document
from mgpu_llm.xinference.importing import imported

QWEN = "xinference launch -en vllm -n qwen2.5-instruct -s 72"
SEED = (
    "xinference launch --model-engine vllm --model-name qwen2.5-instruct --size-in-billions 72 --gpu-idx 2,3 "
    "--gpu_memory_utilization 0.95"
)
#: Each must give a config that loads and passes every check, the model's existence aside.
MANY = (
    SEED,
    QWEN,
    f"{QWEN} --n-gpu 4",
    f"{QWEN} --n-gpu none",
    f"{QWEN} --n-gpu 2 --tensor_parallel_size 4",
    f"{QWEN} --n-gpu 4 --tensor_parallel_size 2 --pipeline_parallel_size 2",
    f"{QWEN} --n-gpu 4 --pipeline_parallel_size 2",
    f"{QWEN} --n-gpu 3 --pipeline_parallel_size 2 --data_parallel_size 2",
    f"{QWEN} --tensor_parallel_size 2 --data_parallel_size 2",
    f"{QWEN} --gpu-idx 0,1,2,3 --replica 2",
    f"{QWEN} --gpu-idx 0,0",
    f"{QWEN} --gpu-idx zero --gpu_memory_utilization 95%",
    f"{QWEN} --gpu_memory_utilization 0.5",
    f"{QWEN} --model-path /models/Qwen2.5-72B-Instruct",
    f"{QWEN} --model-path s3://bucket/model",
    f"{QWEN} --model_path ' --weird '",
    f"{QWEN} -f gptq -q int4 --max_model_len 8192 --enforce_eager True --enable_prefix_caching False",
    f"{QWEN} --lora-modules sql /adapters/sql -lm chat=/adapters/chat --max_lora_rank 64",
    f'{QWEN} --rope_scaling \'{{"rope_type": "yarn", "factor": 4.0}}\' --seed -1 --tokenizer \'--odd one\'',
    f"{QWEN} --served_model_name x --port 1 --api-key {'s' * 8} --trust-remote-code false",
    f"CUDA_VISIBLE_DEVICES=GPU-5e0c0000-0000,GPU-0000 NCCL_DEBUG=INFO NOTIFY_SOCKET=/x CUDA_DEVICE_ORDER=FASTEST_FIRST {QWEN}",
    f"CUDA_VISIBLE_DEVICES=MIG-1 {QWEN} -u 'a name'",
    "xinference launch -en vllm -n deepseek-r1-distill-qwen -s 1_5 -f awq --dtype half",
)


def toml(*command: str) -> str:
    return document.toml(imported(command))


def config(*command: str) -> dict[str, Any]:
    return tomllib.loads(toml(*command))


def remarks(*command: str) -> list[str]:
    return document.remarks(imported(command))


def lost(*command: str) -> list[str]:
    """The options that could not be carried over, without the reasons."""
    prefix = "not carried over: "
    return [line.removeprefix(prefix).split(": ")[0] for line in remarks(*command) if line.startswith(prefix)]


def problems(text: str) -> list[str]:
    """What our own parser and `mgpud --check` say of a config, beside an engine that is there; models that are not
    there are let through, for they are on the host to which the command belongs."""
    sources = [Source(file=Path("a.toml"), text=text), Source(file=Path("b.toml"), text='engine.command = ["/bin/sh"]')]
    found = check(parse(sources, Path("a.toml")), {}, engine_runs=True)
    return [line for line in render(found).splitlines() if ": model.path: " not in line]


def args(*command: str) -> Sequence[str]:
    return tuple(config(*command).get("engine", {}).get("args", ()))
