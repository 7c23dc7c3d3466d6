"""The kinds of values that the config is made of: what each may be, and what an operator reads where it is not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NoReturn

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mgpu_llm.config.address import address
from mgpu_llm.control_api import SOCKET_NAME
from mgpu_llm.core.remedies import Area
from mgpu_llm.core.slices import ONE_SLICE, is_slice

#: A Unix socket's path has 107 bytes at most (sockaddr_un.sun_path on Linux, less its closing zero).
_LONGEST_RUNTIME_DIR: Final = 107 - len(f"/{SOCKET_NAME}")


@dataclass(frozen=True)
class Expected:
    """What an operator should read when a value does not fit; `item` is the same for one element of it."""

    text: str
    item: str = ""


def refuse(expected: str = "", *, key: str = "", hint: str = "", sentence: str = "") -> NoReturn:
    """A rule of ours is broken. `key` names the culprit in a table, a `sentence` replaces "found ..., expected ..."."""
    raise PydanticCustomError("rule", "rule", {"expected": expected, "key": key, "hint": hint, "sentence": sentence})


def _passable(text: str) -> str:
    if "\0" in text:
        refuse("text without zero bytes, which no command line can carry")
    return text


def _printable(text: str) -> str:
    if not text.isprintable():
        refuse("text without control characters")
    return text


def _not_an_option(text: str) -> str:
    if text.startswith("-") or text != text.strip():
        refuse('text that neither begins with "-" nor has blanks around it')
    return text


def _one_argument(text: str) -> str:
    if option := re.match(r"(--?[A-Za-z][\w.-]*)\s", text):
        refuse("one argument per string", hint=f'write "{option[1]}" and its value as two strings')
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        refuse("a variable's name of letters, digits and _")
    return name


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        refuse("an absolute path")
    return path


def _one_at_least(folders: tuple[str, ...]) -> tuple[str, ...]:
    if not folders:
        refuse("one absolute path at least")
    return folders


def _room_for_socket(path: str) -> str:
    if len(path.encode()) > _LONGEST_RUNTIME_DIR:
        refuse(f"a path of at most {_LONGEST_RUNTIME_DIR} bytes, so that its control socket can have a name")
    return path


def _listened_on(text: str) -> str:
    if text != OFF and address(text) is None:
        refuse(LISTEN)
    return text


def _used_gpus(value: object) -> Literal["all", "none"] | tuple[int | str, ...]:
    if value == "all" or value == "none":
        return value
    if value == ():
        refuse(USE, hint='write "none" to run without GPUs')
    chosen = _listed_gpus(value, USE)
    if len(chosen) > 1 and any(is_slice(gpu) for gpu in chosen):
        refuse("whole GPUs, or one MIG slice by itself", hint=ONE_SLICE)
    return chosen


def _spare_gpus(value: object) -> tuple[int | str, ...]:
    return _listed_gpus(value, SPARES)


def _listed_gpus(value: object, expected: str) -> tuple[int | str, ...]:
    if not isinstance(value, tuple):
        refuse(expected)
    for gpu in value:
        if isinstance(gpu, bool) or not ((isinstance(gpu, int) and gpu >= 0) or _is_uuid(gpu)):
            refuse(expected)
    twice = [gpu for gpu, count in Counter(value).items() if count > 1]
    if twice:
        refuse("each GPU once", hint=f"{', '.join(str(gpu) for gpu in twice)} is there more than once")
    return value


def _is_uuid(gpu: object) -> bool:
    return isinstance(gpu, str) and re.fullmatch(_UUID, gpu) is not None


def _matching(pattern: str) -> WithJsonSchema:
    """A text for the JSON schema, by what a pattern can say of our own rules."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


def _gpus(**more: object) -> dict[str, object]:
    index, uuid = {"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_UUID}$"}
    return {"type": "array", "items": {"anyOf": [index, uuid]}, "uniqueItems": True, **more}


#: How a UUID of a GPU or of a MIG slice looks.
_UUID: Final = "(?:GPU|MIG)-[0-9a-f][0-9a-f-]*"
_CONTROL: Final = r"\u0000-\u001f\u007f-\u009f"
OFF: Final = "off"
LISTEN: Final = '"off", or an IP address and a port such as "127.0.0.1:19400"'
USE: Final = '"all", "none", a list of indices or of UUIDs'
SPARES: Final = "a list of indices or of UUIDs"
_AREA: Final = ", ".join(f'"{area}"' for area in Area)
Text = Annotated[str, AfterValidator(_printable), _matching(rf"^[^{_CONTROL}]*$")]
Word = Annotated[
    Text, AfterValidator(_not_an_option), _matching(rf"^([^\s{_CONTROL}-]([^{_CONTROL}]*[^\s{_CONTROL}])?)?$")
]
Folder = Annotated[Text, AfterValidator(_absolute), _matching(rf"^/[^{_CONTROL}]*$"), Expected("an absolute path")]
Folders = Annotated[
    tuple[Folder, ...],
    AfterValidator(_one_at_least),
    Field(json_schema_extra={"minItems": 1}),
    Expected("an array of absolute paths", item="an absolute path"),
]
SocketFolder = Annotated[
    Folder, AfterValidator(_room_for_socket), Field(json_schema_extra={"maxLength": _LONGEST_RUNTIME_DIR})
]
Listen = Annotated[
    str,
    AfterValidator(_listened_on),
    _matching(r"^(off|([0-9]{1,3}(\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})$"),
    Expected(LISTEN),
]
Argument = Annotated[
    str,
    AfterValidator(_passable),
    AfterValidator(_one_argument),
    _matching(r"^(?!--?[A-Za-z][\w.-]*\s)[^\u0000]*$"),
]
Environment = Annotated[
    dict[Annotated[str, AfterValidator(_variable)], Annotated[str, AfterValidator(_passable)]],
    Field(repr=False),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "additionalProperties": {"type": "string", "pattern": r"^[^\u0000]*$"},
        }
    ),
    Expected("a table of strings", item="a string"),
]
Arguments = Annotated[
    tuple[Argument, ...], Field(repr=False), Expected("an array of strings, one for each argument", item="a string")
]
Duration = Annotated[float, Field(ge=0.1, le=86400), Expected("seconds from 0.1 to 86400 (a day)")]
Wait = Annotated[float, Field(ge=0, le=86400), Expected("seconds from 0 to 86400 (a day)")]
UsedGpus = Annotated[
    Literal["all", "none"] | tuple[int | str, ...],
    PlainValidator(_used_gpus),
    WithJsonSchema({"anyOf": [{"enum": ["all", "none"]}, _gpus(minItems=1)]}),
    Expected(USE),
]
SpareGpus = Annotated[tuple[int | str, ...], PlainValidator(_spare_gpus), WithJsonSchema(_gpus()), Expected(SPARES)]
#: Not strict, for TOML has no enumerations.
Areas = Annotated[
    tuple[Annotated[Area, Field(strict=False)], ...],
    Expected(f"an array of some of {_AREA}", item=f"one of {_AREA}"),
]
Fraction = Annotated[float, Field(gt=0, le=1), Expected("a fraction above 0 and up to 1")]
Switch = Annotated[bool, Expected("true or false")]
Count = Annotated[int, Field(ge=1, le=1000), Expected("an integer from 1 to 1000")]
#: The daemon remembers as many attempts, and no more.
Tries = Annotated[int, Field(ge=1, le=100), Expected("an integer from 1 to 100")]
Kept = Annotated[int, Field(ge=0, le=1000), Expected("an integer from 0 to 1000")]
Mebibytes = Annotated[int, Field(ge=1, le=100_000), Expected("MiB as an integer from 1 to 100000")]
