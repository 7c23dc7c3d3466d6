"""What can be known of the model before it is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.schema import Config
from mgpu_llm.core.ladder import Heads

CONFIG_FILE: Final = "config.json"
#: Mistral's own format, which vLLM loads too, keeps its settings here.
MISTRAL_FILE: Final = "params.json"
#: "organisation/name" as the Hugging Face hub allows it (huggingface_hub, validate_repo_id).
HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)

ATTENTION_HEADS: Final = ("num_attention_heads", "n_heads", "n_head", "num_heads")
#: In the order in which vLLM looks for them (transformers_utils/model_arch_config_convertor.py, 0.32.0).
KEY_VALUE_HEADS: Final = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
    "n_kv_heads",
)
_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS: Final = ("model*.safetensors", "*.safetensors", "*.bin", "*.pt", "*.gguf")
#: Where multimodal models keep the settings of the language model.
_NESTED: Final = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFingerprint:
    """What tells one model from another without reading its weights; equal ones are taken for the same model.

    `path` is absolute for a local model, else as configured (a hub id, a URL). `bytes` is the size of the weight files and
    `config_sha256` the digest of the settings file's bytes in hexadecimal; None and "" where there is none to be read.
    """

    path: str
    bytes: int | None
    config_sha256: str


def local_path(path: str) -> Path | None:
    """The absolute local path that `path` means, None for a hub id, a URL or the like. It need not exist."""
    return expanded(path).absolute() if path.startswith(("/", ".", "~")) or _exists(path) else None


def expanded(path: str) -> Path:
    """With the home folder for a leading "~", as written where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except OSError:  # a name too long, a folder that may not be searched
        return False


def read_model(folder: Path) -> Heads:
    """The heads of the model in a folder, as its config.json (or Mistral's params.json) tells them.

    Raises OSError where it cannot be read and ValueError where it is not a model's.
    """
    file = _settings_file(folder)
    settings = json_object(file)
    if file.name == CONFIG_FILE and not settings.keys() & {"model_type", "architectures"}:
        raise ValueError('it has neither "model_type" nor "architectures"')
    return _heads(settings)


def model_heads(config: Config, environ: Mapping[str, str]) -> Heads:
    """The heads of the configured model, unknown ones for a hub model that is not in the local cache."""
    folder = model_folder(config, environ)
    try:
        return read_model(folder) if folder is not None else Heads()
    except (OSError, ValueError):
        return Heads()


def model_settings(config: Config, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """What is in the configured model's config.json (or Mistral's params.json), {} where that cannot be read."""
    folder = model_folder(config, environ)
    try:
        return json_object(_settings_file(folder)) if folder is not None else {}
    except (OSError, ValueError):
        return {}


def weights_bytes(config: Config, environ: Mapping[str, str]) -> int | None:
    """The size of the model's weight files, None where it cannot be told or where they are not read."""
    if options.value(config.engine.args, options.LOAD_FORMAT) == "dummy":
        return None
    folder = model_folder(config, environ)
    try:
        return sum(file.stat().st_size for file in weight_files(folder)) or None if folder is not None else None
    except (OSError, ValueError):
        return None


def fingerprint(config: Config, environ: Mapping[str, str]) -> ModelFingerprint:
    """The configured model as it is on this host now. Raises nothing: what cannot be read is a part of it, too."""
    path, folder = local_path(config.model.path), model_folder(config, environ)
    try:
        digest = "" if folder is None else hashlib.sha256(_settings_file(folder).read_bytes()).hexdigest()
    except OSError:
        digest = ""
    return ModelFingerprint(
        path=config.model.path if path is None else str(path),
        bytes=weights_bytes(config, environ),
        config_sha256=digest,
    )


def model_folder(config: Config, environ: Mapping[str, str]) -> Path | None:
    """Where the model lies on this host, None for a hub model that is not in the local cache."""
    return local_path(config.model.path) or _cached(config.model.path, {**environ, **config.engine.env})


def _settings_file(folder: Path) -> Path:
    """config.json, or Mistral's params.json where there is only that. It need not exist."""
    file, mistral = folder / CONFIG_FILE, folder / MISTRAL_FILE
    return mistral if not file.exists() and mistral.exists() else file


def weight_files(folder: Path) -> set[Path]:
    """The files that vLLM reads: those of the index, or every one of the first kind that there is. Raises OSError and
    ValueError where that cannot be told."""
    listed = weight_index(folder)
    if listed is not None:
        return {folder / name for name in set(map(str, listed.values()))}
    found = (set(folder.glob(pattern)) for pattern in _WEIGHTS)
    return next((files for files in found if files), set())


def weight_index(folder: Path) -> Mapping[str, Any] | None:
    """Which file has which tensor, as the index says, None where there is no index. Raises OSError and ValueError where it
    cannot be read."""
    for name in _INDEXES:
        if (folder / name).is_file():
            listed = json_object(folder / name).get("weight_map")
            return listed if isinstance(listed, Mapping) else {}
    return None


def json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError("it is not text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg.lower()} in line {error.lineno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is JSON, but not an object")
    return content


def _heads(settings: Mapping[str, Any]) -> Heads:
    for candidate in language_models(settings):
        if (attention := first_integer(candidate, ATTENTION_HEADS)) is not None:
            return Heads(attention=attention, key_value=first_integer(candidate, KEY_VALUE_HEADS))
    return Heads()


def language_models(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The language model's own settings first: beside them, a multimodal model may have others of the same name."""
    for name in _NESTED:
        if isinstance(inner := settings.get(name), Mapping):
            yield from language_models(inner)
    yield settings


def first_integer(settings: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (settings.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)


def _cached(hub_id: str, environ: Mapping[str, str]) -> Path | None:
    """The snapshot of the main branch in the hub's cache (huggingface_hub, constants.py), if it is there."""
    if not HUB_ID.fullmatch(hub_id):
        return None
    home = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache")
    hub = environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or home / "huggingface") / "hub"
    repository = Path(hub) / f"models--{hub_id.replace('/', '--')}"
    try:
        return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
