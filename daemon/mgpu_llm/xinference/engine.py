"""The options that Xinference hands to vLLM, as vLLM's command line writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Final

from mgpu_llm.xinference import gpus
from mgpu_llm.xinference.command import Asked, Given
from mgpu_llm.xinference.findings import Argument, Finding, Left, Remark, Same
from mgpu_llm.xinference.tables import NEW_VLLM, OLD_VLLM, options

#: Xinference's own, or with another place here.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "model": "the model is what --model-name or --model-path names",
    "served_model_name": "clients of Xinference ask for the model's uid, and so does model.served_name",
    "device_ids": "set gpus.use",
    "host": "set engine.host",
    "port": "set engine.port",
    "device": 'gpus.use says it: indices, or "none" for the CPU',
    "download_hub": "vLLM fetches from Hugging Face, or with VLLM_USE_MODELSCOPE in [engine.env] from ModelScope",
    "reasoning_content": 'vLLM does it with "--reasoning-parser" and a name that fits the model, in engine.args',
    "request_limits": "vLLM queues what is more than --max-num-seqs; a limit with refusals belongs into a proxy",
    "model_version": "--model-path or the hub id says which",
    "enable_xavier": "it shares caches between Xinference's replicas, and here is one engine",
    "xavier_transfer_block_num": "it is part of enable_xavier",
    "enable_tensorizer": "it is for Xinference's Transformers engine",
    "enable_thinking": "it belongs to a request: chat_template_kwargs",
    "peft_model_config": "use --lora-modules",
    "address": "it belongs to Xinference's workers",
    "shard": "it belongs to Xinference's workers",
    "driver_info": "it belongs to Xinference's workers",
    "distributed_executor_backend": "Xinference has an executor of its own; here vLLM starts its workers by itself",
}
_RENAMED: Final[Mapping[str, str]] = {"model_quantization": "quantization"}
_TRUE, _FALSE = ("true", "1", "yes", "on", "t", "y"), ("false", "0", "no", "off", "f", "n")


def engine_findings(asked: Asked) -> Iterator[Finding]:
    for name, given in sorted(asked.engine.items()):
        if name not in gpus.DECIDED:
            yield from _one(_RENAMED.get(name, name), given)
    yield from _trust(asked.options.get("trust-remote-code"), asked.engine.get("trust_remote_code"))
    yield from _lora(asked)


def _one(name: str, given: Given) -> Iterator[Finding]:
    option = options().get(name)
    if name in _ELSEWHERE:
        yield Left(what=given.text, why=_ELSEWHERE[name])
        return
    if option is None:
        close = get_close_matches(name, options(), n=1, cutoff=0.8)
        hint = f"; did you mean --{close[0]}?" if close else ""
        yield Left(what=given.text, why=f"vLLM has no such engine option ({OLD_VLLM} and {NEW_VLLM}){hint}")
        return
    written = f"--{name.replace('_', '-')}"
    if given.value == "None":
        yield Same(what=given.text)
        return
    if option.kind == "value" and given.alone:
        yield Left(what=given.text, why="it has no value")
        return
    if option.kind == "value":
        yield _with_value(written, given)
        if name == "limit_mm_per_prompt" and given.value.lstrip().startswith("{"):
            yield Remark(
                about="engine.args",
                text=f'vLLM {OLD_VLLM} wants --limit-mm-per-prompt as "image=2", newer ones as JSON',
            )
    elif given.value.lower() in _TRUE:
        yield Argument(words=(written,), why=given.text)
    elif given.value.lower() not in _FALSE:
        yield Left(what=given.text, why="it is neither true nor false")
        return
    elif option.kind == "switch":
        yield Argument(words=(f"--no-{written[2:]}",), why=given.text)
    else:
        yield Same(what=given.text)
        return
    if option.versions == OLD_VLLM:
        text = f"{written} is an option of vLLM {OLD_VLLM}, and none of {NEW_VLLM}; take it out where vLLM refuses it"
        yield Remark(about="engine.args", text=text)


def _with_value(written: str, given: Given) -> Finding:
    if "\0" in given.value:
        return Left(what=given.word, why="no command line can carry its value")
    if given.value.startswith("-") or not given.value:
        return Argument(words=(f"{written}={given.value}",), why=given.text)
    return Argument(words=(written, given.value), why=given.text)


def _trust(own: Given | None, engine: Given | None) -> Iterator[Finding]:
    """Xinference lets models bring code unless it is told not to."""
    given = own or engine
    if given is None:
        why = "Xinference's default; take it out unless the model brings code of its own that you trust"
        yield Argument(words=("--trust-remote-code",), why=why)
    elif given.value.lower() in (*_FALSE, "none"):
        yield Same(what=given.text)
    elif given.value.lower() in _TRUE:
        yield Argument(words=("--trust-remote-code",), why=given.text)
    else:
        yield Left(what=given.text, why="it is neither true nor false")


def _lora(asked: Asked) -> Iterator[Finding]:
    modules = asked.pairs.get("lora-modules", {})
    if not modules:
        return
    given = {
        name: path for name, path in sorted(modules.items()) if "\0" not in name + path and name[:1] not in ("", "-")
    }
    for name in modules.keys() - given.keys():
        yield Left(what=f"--lora-modules {name}", why="it can be no name of a module")
    if not given:
        return
    why = "--lora-modules"
    yield Argument(words=("--enable-lora",), why=why)
    if "max_loras" not in asked.engine:
        yield Argument(words=("--max-loras", str(len(given))), why=why)
    yield Argument(words=("--lora-modules", *(f"{name}={path}" for name, path in given.items())), why=why)
