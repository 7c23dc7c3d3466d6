"""What the configured model will need on the GPUs, from its files' headers and its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from mgpu_llm.config import architecture
from mgpu_llm.config import engine_args as options
from mgpu_llm.config.context import context_length
from mgpu_llm.config.model import (
    MISTRAL_FILE,
    local_path,
    model_folder,
    model_settings,
    weight_files,
    weight_index,
)
from mgpu_llm.config.safetensors import BrokenFileError, read_header
from mgpu_llm.config.schema import Config
from mgpu_llm.core.fit import Need
from mgpu_llm.core.sharding import FLOATS, Loading, Tensor, lay, unused

#: What is read as it is stored (vLLM 0.32.0, model_executor/model_loader). "auto" and none at all take safetensors first.
_PLAIN_FORMATS: Final = (None, "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
DUMMY: Final = "dummy"
EAGER: Final[options.Option] = ("--enforce-eager",)
QUANTISATION: Final[options.Option] = ("--quantization", "-q")
#: With any of these it is another config.json, or another model, than the one that lies here.
_OTHER_SETTINGS: Final[tuple[options.Option, ...]] = (
    options.CONFIG_FILE,
    ("--hf-config-path",),
    ("--hf-overrides",),
    ("--config-format",),
    ("--mm-encoder-only",),  # leaves the language model out
)
#: Options of Python before a module, which are none of vLLM's.
_PYTHONS: Final = ("-m", "-u", "-I", "-s", "-S", "-E", "-P")
#: Under a hub id the files are then others than those of the main branch in the hub's cache.
_OTHER_PLACE: Final[tuple[options.Option, ...]] = (("--revision",), ("--download-dir",))
_OTHER_HUB: Final = "VLLM_USE_MODELSCOPE"
SUFFIX: Final = ".safetensors"
#: With any of these what is known of the cache does not hold; or the model may compute no tokens, and need no cache.
_OTHER_CACHE: Final[tuple[options.Option, ...]] = (
    ("--kv-cache-memory-bytes", "--kv-cache-memory"),
    ("--num-gpu-blocks-override",),
    ("--decode-context-parallel-size", "-dcp"),
    ("--runner",),
    ("--task",),
    ("--convert",),
    ("--speculative-config", "-sc"),
    ("--hisparse-config",),
)
#: What sentence-transformers writes beside: vLLM then computes embeddings, and no tokens.
_EMBEDDING_MODEL: Final = ("modules.json", "sentence_bert_config.json", "1_Pooling")
#: ModelOpt writes here how it has quantised, which config.json need not say.
_QUANTISED_BESIDE: Final = "hf_quant_config.json"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is needed. `read_bytes` of `files` headers were read for it, `stored_bytes` is what these files hold; none of
    them where it was reckoned from config.json alone."""

    need: Need
    files: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A weight file that cannot be loaded, and why."""

    file: Path
    why: str


def known(config: Config, environ: Mapping[str, str]) -> Known | str:
    """What the model needs, or why nobody can tell. `environ` is what the engine inherits. Raises nothing."""
    folder, settings = model_folder(config, environ), model_settings(config, environ)
    if folder is None:
        return "it is not on this host yet"
    if why := _unknowable(config, environ, folder, settings):
        return why
    found = _of_files(folder) if options.value(config.engine.args, options.LOAD_FORMAT) != DUMMY else None
    if isinstance(found, str):
        return found
    tensors = found.tensors if found is not None else architecture.tensors(settings)
    if tensors is None:
        return "without weight files that is known for plain models only"
    if architecture.quantisation(settings) and not any(tensor.dtype not in FLOATS for tensor in tensors):
        return "its weights are quantised only while they are loaded"
    need = _need(
        config, environ, settings, tensors, generates=not any(_is_there(folder / name) for name in _EMBEDDING_MODEL)
    )
    if found is None:
        return Known(need=need)
    stored = sum(tensor.bytes for tensor in tensors)
    return Known(need=need, files=found.files, read_bytes=found.read_bytes, stored_bytes=stored)


def _need(
    config: Config,
    environ: Mapping[str, str],
    settings: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    generates: bool,
) -> Need:
    args = config.engine.args
    generates = generates and architecture.generates(settings)
    cache = None if _sets_any(args, _OTHER_CACHE) else architecture.cache(settings, args)
    tied = architecture.is_tied(settings)
    loading = Loading(
        layers=architecture.layers(architecture.shape(settings)),
        float_bytes=architecture.float_bytes(args),
        tied=bool(tied),
        has_head=tied is False and generates and not _sets_any(args, _OTHER_CACHE),
        quantised=bool(architecture.quantisation(settings)),
    )
    return Need(
        weights=lay(tensors, loading),
        cache=cache if cache is None or generates else replace(cache, certain=False),
        context=context_length(config, environ),
        heads=architecture.key_value_heads(settings) or 1,
        activation=architecture.activation(settings, args),
        pipeline_parallel=prod(options.multipliers(args).values()),
        graphs=not options.has(args, EAGER),
    )


def broken_files(config: Config, environ: Mapping[str, str]) -> Iterator[Broken]:
    """Every weight file of the model that is not whole. Of a hub model those that are missing are still to be fetched, and
    Mistral's own format has files beside those of the index."""
    folder = model_folder(config, environ)
    if folder is None or options.value(config.engine.args, options.LOAD_FORMAT) not in _PLAIN_FORMATS:
        return
    if _hides_options(config):
        return
    if _is_there(folder / MISTRAL_FILE) or _other_model(config, environ):
        return
    for file in _needed(folder, architecture.layers(architecture.shape(model_settings(config, environ)))):
        try:
            read_header(file)
        except FileNotFoundError:
            if local_path(config.model.path) is not None:
                yield Broken(file=file, why="it is not there")
        except BrokenFileError as error:
            yield Broken(file=file, why=str(error))
        except OSError as error:
            yield Broken(file=file, why=(error.strerror or str(error)).lower())


def _needed(folder: Path, layers: int | None) -> list[Path]:
    """Those with anything in them that is loaded: by the index, or all."""
    files = _safetensors(folder)
    index = weight_index(folder) if files else None
    if index is None:
        return files
    needed = {str(file) for name, file in index.items() if not unused(name, layers)}
    paths = {folder / name for name in needed}
    return [file for file in files if file in paths]


def _unknowable(config: Config, environ: Mapping[str, str], folder: Path, settings: Mapping[str, Any]) -> str:
    """Why nothing can be said at all, "" where something can."""
    args = config.engine.args
    if not settings:
        return "its config.json does not tell"
    if _hides_options(config):
        return "engine.command has options of its own"
    if options.value(args, options.LOAD_FORMAT) not in (*_PLAIN_FORMATS, DUMMY):
        return "--load-format has weights loaded otherwise than they are stored"
    if _sets_any(args, _OTHER_SETTINGS):
        return "engine.args lay other settings over its config.json"
    if _other_model(config, environ):
        return "it is another one than the hub's cache has"
    if set(options.multipliers(args)) - {options.PIPELINE_PARALLEL} or not options.one_host(args):
        return "ranks are laid out in a way that is not known here"
    fine = {architecture.DTYPE, QUANTISATION} if architecture.quantisation(settings) else {architecture.DTYPE}
    if _sets_any(args, [option for option in options.OTHER_WEIGHTS if option not in fine]):
        return "engine.args change the weights, or where they are kept"
    return f"{_QUANTISED_BESIDE} changes how they are kept" if _is_there(folder / _QUANTISED_BESIDE) else ""


def _hides_options(config: Config) -> bool:
    """Whether the command has options that are not among the arguments."""
    return any(word.startswith("-") and word not in _PYTHONS for word in config.engine.command[1:])


def _other_model(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether a hub id means something else than the main branch on the Hugging Face hub."""
    if local_path(config.model.path) is not None:
        return False
    return options.has_any(config.engine.args, _OTHER_PLACE) or _OTHER_HUB in {**environ, **config.engine.env}


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # in a folder that may not be searched
        return False


def _sets_any(args: Sequence[str], any_of: Sequence[options.Option]) -> bool:
    """Whether one of them is set, be it in part ("--hf-overrides.num_hidden_layers")."""
    names = [arg.partition("=")[0].partition(".")[0] for arg in args if arg.startswith("-")]
    return options.has_any(names, any_of)


@dataclass(frozen=True, kw_only=True)
class _Read:
    tensors: tuple[Tensor, ...]
    files: int
    read_bytes: int


def _of_files(folder: Path) -> _Read | str:
    """What the weight files hold; of a name that several have, one."""
    files, read, by_name = _safetensors(folder), 0, dict[str, Tensor]()
    if not files:
        return "it has no safetensors files"
    for file in files:
        try:
            header = read_header(file)
        except (OSError, BrokenFileError):
            return f"its {file.name} is not whole"
        read += header.read_bytes
        by_name.update((tensor.name, tensor) for tensor in header.tensors)
    return _Read(tensors=tuple(by_name.values()), files=len(files), read_bytes=read)


def _safetensors(folder: Path) -> list[Path]:
    """Those that vLLM reads, by name; none where it reads another kind."""
    try:
        return sorted(file for file in weight_files(folder) if file.suffix == SUFFIX)
    except (OSError, ValueError):
        return []
