"""Which model a launch means, and the name its clients ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from mgpu_llm.xinference.command import Asked, Given
from mgpu_llm.xinference.findings import Finding, Key, Left, Remark, Same
from mgpu_llm.xinference.tables import Model, models

_ABOUT = "model.path"
_FIX = "write the model's folder, or its hub id, into model.path"


def model_findings(asked: Asked, env: Mapping[str, str]) -> Iterator[Finding]:
    """model.path and model.served_name. `env` is what stood before the command."""
    if "model-path" in asked.options:
        yield from _own_path(asked)
    else:
        yield from _looked_up(asked, env)
    yield from _served_name(asked)


def find(name: str, size: str, kind: str, quantization: str) -> Model | str:
    """The first that fits, as Xinference looks, but only among those that its vLLM serves; empty texts fit anything.
    Without one: why."""
    named = [model for model in models() if model.name == name]
    if not named:
        close = get_close_matches(name, {model.name for model in models()}, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"none of the models that the vLLM engine of Xinference 1.4.1 serves is named {name!r}{hint}"
    wanted = {"size": _number(size), "format": kind.lower(), "quantization": quantization.lower()}
    for model in named:
        there = {"size": _number(model.size), "format": model.format, "quantization": model.quantization.lower()}
        if all(wanted[part] in ("", there[part]) for part in wanted):
            return model
    known = ", ".join(dict.fromkeys(f"{model.size} {model.format} {model.quantization}" for model in named))
    return f"Xinference 1.4.1 has {name!r} for vLLM only as {known}"


def _number(size: str) -> str:
    """Sizes compare as Xinference's do: "0_5" is "0.5", and "07" is "7"."""
    size = size.replace("_", ".")
    return str(int(size)) if size.isdecimal() and len(size) < 9 else size


def _own_path(asked: Asked) -> Iterator[Finding]:
    given = asked.options["model-path"]
    path = given.value
    if not path or path.startswith("-") or path != path.strip() or not path.isprintable():
        yield Left(what=given.word, why=f"its value can be no model; {_FIX}")
        yield Key(table="model", name="path", value="", why=(given.word,))
        return
    if "$" in path or "`" in path:
        yield Remark(about=_ABOUT, text="a part of it only the shell knows; write what it stands for")
    elif path.startswith("~"):
        yield Remark(about=_ABOUT, text='"~" is the home of the user who runs mgpud; write the absolute path')
    elif not path.startswith("/") and "://" not in path:
        # "models/qwen" would be a hub id here.
        path = path if path.startswith(("./", "../")) else f"./{path}"
        yield Remark(about=_ABOUT, text="Xinference reads it from the folder it runs in; write the absolute path")
    yield Key(table="model", name="path", value=path, why=(given.text,))
    for name in ("size-in-billions", "model-format", "quantization"):
        if name in asked.options:
            yield Same(what=asked.options[name].text)


def _looked_up(asked: Asked, env: Mapping[str, str]) -> Iterator[Finding]:
    parts = [asked.options[name] for name in _LOOKED_UP if name in asked.options]
    text = " ".join(given.text for given in parts)
    found = find(*(_value(asked, name) for name in _LOOKED_UP)) if _value(asked, "model-name") else "it names no model"
    if isinstance(found, str):
        yield Left(what=text or "the model", why=f"{found}; {_FIX}")
        yield Key(table="model", name="path", value="", why=(f"{text or 'the model'}: unknown here; {_FIX}",))
        return
    yield Key(table="model", name="path", value=found.hub_id, why=(text, *_taken(asked, found)))
    home = env.get("XINFERENCE_HOME", "~/.xinference")
    yield Remark(
        about=_ABOUT,
        text=f"what Xinference has fetched is in {home}/cache/{found.cache_folder}; with that folder as model.path, absolute, "
        "nothing is fetched again, if the user mgpu-llm may read it and what it links to",
    )
    if _value(asked, "model-format").lower() == "" and found.format != "pytorch":
        yield Remark(
            about=_ABOUT, text=f"--model-format is not given, and {found.format} is the first that vLLM serves"
        )
    hub = env.get("XINFERENCE_MODEL_SRC", "")
    if hub and hub != "huggingface":
        yield Remark(about=_ABOUT, text=f"it is the id on Hugging Face; on {hub} the model may have another")


_LOOKED_UP = ("model-name", "size-in-billions", "model-format", "quantization")


def _taken(asked: Asked, found: Model) -> tuple[str, ...]:
    """What the command left open, and Xinference's order decided."""
    decided = [
        f"{word} {value}"
        for name, word, value in (
            ("size-in-billions", "size", found.size.replace("_", ".")),
            ("model-format", "format", found.format),
            ("quantization", "quantization", found.quantization),
        )
        if name not in asked.options
    ]
    return (f"not given: the first that its vLLM engine serves is {', '.join(decided)}",) if decided else ()


def _served_name(asked: Asked) -> Iterator[Finding]:
    given = asked.options.get("model-uid") or asked.options.get("model-name")
    if given is None:
        return
    name = given.value
    if not name or name.startswith("-") or name != name.strip() or not name.isprintable():
        yield Left(what=given.word, why="its value cannot be a name; set model.served_name")
        return
    why = given.text if given is asked.options.get("model-uid") else f"{given.text}; there is no --model-uid"
    yield Key(table="model", name="served_name", value=name, why=(f"{why}; clients ask for this name",))


def _value(asked: Asked, name: str) -> str:
    return asked.options.get(name, Given(word="", value="")).value
