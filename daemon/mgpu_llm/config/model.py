"""What can be known of the model before it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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

_ATTENTION: Final = ("num_attention_heads", "n_heads", "n_head", "num_heads")
#: In the order in which vLLM looks for them (transformers_utils/model_arch_config_convertor.py, 0.32.0).
_KEY_VALUE: Final = (
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
    file = folder / CONFIG_FILE
    if not file.exists() and (folder / MISTRAL_FILE).exists():
        return _heads(_json_object(folder / MISTRAL_FILE))
    settings = _json_object(file)
    if not settings.keys() & {"model_type", "architectures"}:
        raise ValueError('it has neither "model_type" nor "architectures"')
    return _heads(settings)


def model_heads(config: Config, environ: Mapping[str, str]) -> Heads:
    """The heads of the configured model, unknown ones for a hub model that is not in the local cache."""
    folder = local_path(config.model.path) or _cached(config.model.path, {**environ, **config.engine.env})
    try:
        return read_model(folder) if folder is not None else Heads()
    except (OSError, ValueError):
        return Heads()


def weights_bytes(config: Config, environ: Mapping[str, str]) -> int | None:
    """The size of the model's weight files, None where it cannot be told or where they are not read."""
    if options.value(config.engine.args, options.LOAD_FORMAT) == "dummy":
        return None
    folder = local_path(config.model.path) or _cached(config.model.path, {**environ, **config.engine.env})
    try:
        return sum(file.stat().st_size for file in _weight_files(folder)) or None if folder is not None else None
    except (OSError, ValueError):
        return None


def _weight_files(folder: Path) -> set[Path]:
    """The files that vLLM reads: those of the index, or every one of the first kind that there is."""
    for name in _INDEXES:
        if (folder / name).is_file():
            listed = _json_object(folder / name).get("weight_map")
            return {folder / str(file) for file in listed.values()} if isinstance(listed, Mapping) else set()
    found = (set(folder.glob(pattern)) for pattern in _WEIGHTS)
    return next((files for files in found if files), set())


def _json_object(file: Path) -> dict[str, Any]:
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
    for candidate in _language_models(settings):
        if (attention := _first_integer(candidate, _ATTENTION)) is not None:
            return Heads(attention=attention, key_value=_first_integer(candidate, _KEY_VALUE))
    return Heads()


def _language_models(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The language model's own settings first: beside them, a multimodal model may have others of the same name."""
    for name in _NESTED:
        if isinstance(inner := settings.get(name), Mapping):
            yield from _language_models(inner)
    yield settings


def _first_integer(settings: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (settings.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


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
