"""Everything that a command means here: its findings, in one order whatever the order of its options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from mgpu_llm.core.launch import WITHHELD
from mgpu_llm.xinference import command
from mgpu_llm.xinference.command import Asked
from mgpu_llm.xinference.engine import engine_findings
from mgpu_llm.xinference.findings import Finding, Left, Remark, Same, Secret, Variable
from mgpu_llm.xinference.gpus import gpu_findings
from mgpu_llm.xinference.model import model_findings
from mgpu_llm.xinference.secrets import hides, hides_word
from mgpu_llm.xinference.words import Launch, NotALaunchError, find_launch

_PORT: Final = 8000
#: Variables that vLLM, PyTorch, NCCL and what they load look at.
_PASSED: Final = re.compile(
    r"(?:NCCL|VLLM|HF|CUDA|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|GLOO|OMP|MKL|TRANSFORMERS|HUGGINGFACE|TOKENIZERS|FLASHINFER|RAY|"
    r"SAFETENSORS|CUBLAS|CUDNN|NVIDIA|UCX)_\w+|LD_LIBRARY_PATH|LD_PRELOAD|TMPDIR|(?:https?|no|all)_proxy|(?:HTTPS?|NO|ALL)_PROXY"
)
_OWN: Final[Mapping[str, str]] = {
    "XINFERENCE_HOME": "vLLM keeps models in HF_HOME; see model.path for what is there already",
    "XINFERENCE_MODEL_SRC": "vLLM fetches from Hugging Face, or with VLLM_USE_MODELSCOPE in [engine.env] from ModelScope",
    "XINFERENCE_ENDPOINT": "there is no server between clients and vLLM here; engine.host and engine.port say where it listens",
}
_ENDPOINT_PORT: Final = 9997


def imported(parts: Sequence[str]) -> tuple[Finding, ...]:
    """What a command means, given as one text or in words. Raises NotALaunchError."""
    launch = find_launch(parts)
    asked, env, hidden = _without_secrets(command.read(launch.words), launch.env)
    kind = asked.options.get("model-type")
    if kind is not None and kind.value.lower() != "llm":
        raise NotALaunchError(f"it launches a model of the type {kind.value!r}, and vLLM is run for LLMs only")
    return (
        *model_findings(asked, env),
        *engine_findings(asked),
        *gpu_findings(asked, env),
        *_variables(env),
        *_others(asked),
        *hidden,
        *_around(launch, asked),
        *_surroundings(launch, asked),
    )


def _without_secrets(asked: Asked, env: Mapping[str, str]) -> tuple[Asked, dict[str, str], list[Finding]]:
    """The same without what must not be printed, and one finding for each of these."""
    hidden = list[Finding]()
    for name, given in sorted({**asked.options, **asked.engine}.items()):
        if name == "api-key":
            hidden.append(Secret(what=given.word, name="VLLM_API_KEY"))
        elif hides(name, given.value):
            hidden.append(Secret(what=given.word, name="HF_TOKEN" if name == "hf_token" else ""))
    for name, value in sorted(env.items()):
        if hides(name, value):
            hidden.append(Secret(what=name, name=name if name not in WITHHELD and _PASSED.fullmatch(name) else ""))
    for option, pairs in asked.pairs.items():
        hidden += [Secret(what=f"--{option}") for name, value in pairs.items() if hides(name, value)]
    clean = replace(
        asked,
        options={name: given for name, given in asked.options.items() if not hides(name, given.value)},
        engine={name: given for name, given in asked.engine.items() if not hides(name, given.value)},
        pairs={option: {n: v for n, v in pairs.items() if not hides(n, v)} for option, pairs in asked.pairs.items()},
        strays=tuple("(hidden)" if hides_word(word) else word for word in asked.strays),
    )
    return clean, {name: value for name, value in env.items() if not hides(name, value)}, hidden


def _variables(env: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in sorted(env.items()):
        if name == "CUDA_VISIBLE_DEVICES":
            continue  # of gpus.use
        if name == "CUDA_DEVICE_ORDER":
            why = "GPUs are counted as nvidia-smi does, by PCI bus id"
            yield Same(what=f"{name}={value}") if value == "PCI_BUS_ID" else Left(what=name, why=why)
        elif name.startswith("XINFERENCE_"):
            yield Left(what=name, why=_OWN.get(name, "it is a setting of Xinference's own"))
        elif name in WITHHELD or not _PASSED.fullmatch(name):
            why = "vLLM has no use for it, as far as is known; where it has, write it into [engine.env]"
            yield Left(what=name, why="it belongs to the daemon" if name in WITHHELD else why)
        elif "$" in value or "`" in value or "\0" in value:
            yield Left(what=name, why="a part of its value only the shell knows; write it into [engine.env]")
        else:
            yield Variable(name=name, value=value, why="stood before the command")
            if name == "NCCL_P2P_DISABLE" and value == "1":
                text = "the ladder tries this by itself where it is needed; without the need it makes GPUs talk slower"
                yield Remark(about="engine.env.NCCL_P2P_DISABLE", text=text)


def _others(asked: Asked) -> Iterator[Finding]:
    """Xinference's own options that neither name the model nor GPUs."""
    for name, given in sorted(asked.options.items()):
        match name:
            case "model-engine" if given.value.lower() != "vllm":
                yield Left(what=given.text, why="mgpu-llm runs vLLM, and the model must be one that vLLM can serve")
            case "model-engine" | "model-type":
                yield Same(what=given.text)
            case "n-worker" if given.value == "1":
                yield Same(what=given.text)
            case "n-worker":
                yield Left(what=given.text, why="a daemon watches the processes of one host")
            case "worker-ip":
                yield Left(what=given.text, why="run mgpu-llm on that host")
            case "endpoint":
                yield Left(what=given.text, why=_OWN["XINFERENCE_ENDPOINT"])
            case _:
                continue  # of the model or the GPUs
    for name in ("image-lora-load-kwargs", "image-lora-fuse-kwargs"):
        for first in sorted(asked.pairs.get(name, {})):
            yield Left(what=f"--{name} {first}", why="it is for models that make images")


def _around(launch: Launch, asked: Asked) -> Iterator[Finding]:
    for word in asked.strays:
        yield Left(what=repr(word), why="it belongs to no option; Xinference would refuse it")
    for program in launch.around:
        # Only what is called: a login beside the launch has its password among its words.
        yield Left(
            what="(hidden)" if hides_word(program) else repr(program), why="another command beside `xinference launch`"
        )


def _surroundings(launch: Launch, asked: Asked) -> Iterator[Finding]:
    """What no option says, and an admin who moves should know."""
    folder = launch.program.rpartition("/")[0]
    where = (
        f'"{folder}/python"' if folder.startswith("/") and folder.isprintable() else "the Python beside `xinference`"
    )
    text = f"not set: vLLM must be in mgpu-llm's environment or on the PATH; the one that Xinference used is that of {where}"
    yield Remark(about="engine.python", text=text)
    endpoint = asked.options.get("endpoint")
    port = re.search(r":(\d{1,5})/?$", endpoint.value) if endpoint else None
    own = int(port[1]) if port and 1 <= int(port[1]) <= 65535 else _ENDPOINT_PORT
    text = f"clients find the model on port {_PORT} of this host only; Xinference's were sent to port {own}"
    yield Remark(about="engine.host, engine.port", text=text)
