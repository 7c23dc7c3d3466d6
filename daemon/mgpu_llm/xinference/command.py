"""What a launch asks for: Xinference's own options, and those that it hands to vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mgpu_llm.xinference.words import NotALaunchError

#: Every option of `xinference launch`, and its short form (1.4.1).
OPTIONS: Final[Mapping[str, str]] = {
    "endpoint": "e",
    "model-name": "n",
    "model-type": "t",
    "model-engine": "en",
    "model-uid": "u",
    "size-in-billions": "s",
    "model-format": "f",
    "quantization": "q",
    "replica": "r",
    "n-worker": "",
    "n-gpu": "",
    "lora-modules": "lm",
    "image-lora-load-kwargs": "ld",
    "image-lora-fuse-kwargs": "fd",
    "worker-ip": "",
    "gpu-idx": "",
    "trust-remote-code": "",
    "api-key": "ak",
    "model-path": "mp",
}
#: Take two words each, and may be given more than once.
PAIRED: Final = ("lora-modules", "image-lora-load-kwargs", "image-lora-fuse-kwargs")
_SHORT: Final = {short: name for name, short in OPTIONS.items() if short}
_DASHES: Final = re.compile(r"^(?:[–—―−]+-?|-[–—―−]+)")


@dataclass(frozen=True, kw_only=True)
class Given:
    """An option as it was written, and its value: "True" for one that stands `alone`."""

    word: str
    value: str
    alone: bool = False

    @property
    def text(self) -> str:
        return self.word if self.alone else f"{self.word} {self.value}".strip()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`options` by their long name without dashes, `engine` by the name of vLLM's field ("max_model_len").

    `pairs` has the options that take two words. `strays` are words that belong to no option.
    """

    options: Mapping[str, Given] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    engine: Mapping[str, Given] = field(default_factory=dict)
    strays: tuple[str, ...] = ()


def read(words: Sequence[str]) -> Asked:
    """Of an option given twice the last one holds, as in Xinference. Underscores and dashes in names are the same here,
    and "--x=v" is "--x v", both of which Xinference takes for its own options only. Raises NotALaunchError."""
    options, engine, strays = dict[str, Given](), dict[str, Given](), list[str]()
    pairs: dict[str, dict[str, str]] = {name: {} for name in PAIRED}
    left = [_plain_dashes(word) for word in words]
    while left:
        word = left.pop(0)
        written, name, value = _option(word)
        if not written:
            strays += [word] if word != "--" else []
        elif name in PAIRED:
            first, second = _pair(written, value, left)
            pairs[name][first] = second
        elif name in OPTIONS:
            options[name] = Given(word=written, value=_needed(written, left) if value is None else value)
        else:
            alone = value is None and (not left or _option(left[0])[0] != "")
            chosen = "True" if alone else left.pop(0) if value is None else value
            engine[name] = Given(word=written, value=chosen, alone=alone)
    return Asked(options=options, pairs=pairs, engine=engine, strays=tuple(strays))


def _plain_dashes(word: str) -> str:
    """Editors and chats make one long dash of two."""
    return _DASHES.sub("--", word) if len(word) > 1 else word


def _option(word: str) -> tuple[str, str, str | None]:
    """As it is written, its name, and the value that is in the same word; "" as written for what is no option."""
    if not re.match(r"--?[A-Za-z]", word):
        return "", "", None
    written, equals, value = word.partition("=")
    bare = written.lstrip("-")
    if written.startswith("--"):
        name = bare.replace("_", "-")
        return written, name if name in OPTIONS else bare.replace("-", "_"), value if equals else None
    if bare in _SHORT:
        return written, _SHORT[bare], value if equals else None
    if word.startswith("-ak"):  # whatever was meant, it may be a key
        return "-ak", "api-key", word[3:]
    if bare[0] in _SHORT:  # -s72
        return written[:2], _SHORT[bare[0]], word[2:]
    return written, bare.replace("-", "_"), value if equals else None


def _needed(written: str, left: list[str]) -> str:
    if not left or _is_known(left[0]):
        raise NotALaunchError(f"its option {written} has no value")
    return left.pop(0)


def _is_known(word: str) -> bool:
    written, name, _ = _option(word)
    return bool(written) and (word.startswith("--") or written.lstrip("-") in _SHORT) and name in OPTIONS


def _pair(written: str, value: str | None, left: list[str]) -> tuple[str, str]:
    """NAME PATH, and NAME=PATH, which is how Xinference's help has it."""
    first = _needed(written, left) if value is None else value
    name, equals, path = first.partition("=")
    if equals:
        return name, path
    return first, _needed(written, left)
