"""The shape of the config: every key, its default, and the bounds within which it makes sense.

Durations are seconds, sizes of GPU memory are fractions of the whole.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from mgpu_llm.control_api import DEFAULT_RUNTIME_DIR, DEFAULT_STATE_DIR, SOCKET_NAME
from mgpu_llm.core import ladder
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S

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


def _room_for_socket(path: str) -> str:
    if len(path.encode()) > _LONGEST_RUNTIME_DIR:
        refuse(f"a path of at most {_LONGEST_RUNTIME_DIR} bytes, so that its control socket can have a name")
    return path


def _used_gpus(value: object) -> Literal["all", "none"] | tuple[int | str, ...]:
    if value == "all" or value == "none":
        return value
    if not isinstance(value, tuple):
        refuse(USE)
    if not value:
        refuse(USE, hint='write "none" to run without GPUs')
    for gpu in value:
        if isinstance(gpu, str) and gpu.startswith("MIG-"):
            refuse(USE, hint="a MIG slice cannot be used, name whole GPUs")
        if isinstance(gpu, bool) or not ((isinstance(gpu, int) and gpu >= 0) or _is_uuid(gpu)):
            refuse(USE)
    twice = [gpu for gpu, count in Counter(value).items() if count > 1]
    if twice:
        refuse("each GPU once", hint=f"{', '.join(str(gpu) for gpu in twice)} is there more than once")
    return value


def _is_uuid(gpu: object) -> bool:
    return isinstance(gpu, str) and re.fullmatch(r"GPU-[0-9a-f][0-9a-f-]*", gpu) is not None


USE: Final = '"all", "none", a list of indices or of UUIDs'
Text = Annotated[str, AfterValidator(_printable)]
Argument = Annotated[str, AfterValidator(_passable), AfterValidator(_one_argument)]
Environment = Annotated[
    dict[Annotated[str, AfterValidator(_variable)], Annotated[str, AfterValidator(_passable)]],
    Field(repr=False),
    Expected("a table of strings", item="a string"),
]
Arguments = Annotated[
    tuple[Argument, ...], Field(repr=False), Expected("an array of strings, one for each argument", item="a string")
]
Duration = Annotated[float, Field(ge=0.1, le=86400), Expected("seconds from 0.1 to 86400 (a day)")]
Wait = Annotated[float, Field(ge=0, le=86400), Expected("seconds from 0 to 86400 (a day)")]
Fraction = Annotated[float, Field(gt=0, le=1), Expected("a fraction above 0 and up to 1")]
Switch = Annotated[bool, Expected("true or false")]
Count = Annotated[int, Field(ge=1, le=1000), Expected("an integer from 1 to 1000")]
Kept = Annotated[int, Field(ge=0, le=1000), Expected("an integer from 0 to 1000")]
Mebibytes = Annotated[int, Field(ge=1, le=100_000), Expected("MiB as an integer from 1 to 100000")]


class Table(BaseModel):
    """Strict: an operator who writes a string where a number belongs is told, not guessed at."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Table):
    """What is served."""

    path: Annotated[Text, AfterValidator(_not_an_option), Expected("a string: a folder or a hub id")] = ""
    served_name: Annotated[Text, AfterValidator(_not_an_option), Expected("a string")] = ""


class EngineSettings(Table):
    """How vLLM is called and where it listens. `args` and `env` stay out of repr: they may hold an API key."""

    command: Annotated[tuple[Text, ...], Expected('an array of strings such as ["vllm", "serve"]', "a string")] = ()
    python: Annotated[Text, AfterValidator(_not_an_option), Expected("a string: the path of a Python")] = ""
    host: Annotated[Text, AfterValidator(_not_an_option), Expected("a string: an address or a host name")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535), Expected("an integer from 1 to 65535")] = 8000
    args: Arguments = ()
    env: Environment = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way_to_call(self) -> Self:
        if self.command and self.python:
            refuse(key="python", sentence="engine.command says how vLLM is called already", hint="keep one of them")
        if self.command and not self.command[0]:
            refuse("a program first", key="command")
        return self


class GpuSettings(Table):
    """The GPUs and how the model is spread over them. `tensor_parallel` "auto" is the number of GPUs."""

    use: Annotated[Literal["all", "none"] | tuple[int | str, ...], PlainValidator(_used_gpus), Expected(USE)] = "all"
    tensor_parallel: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=1024)], Expected('"auto" or an integer from 1 to 1024')
    ] = "auto"
    memory_utilisation: Fraction = 0.90
    utilisation_step: Annotated[float, Field(ge=0.01, lt=1), Expected("a fraction from 0.01 to below 1")] = 0.05
    utilisation_floor: Fraction = 0.70

    @model_validator(mode="after")
    def _floor_below_start(self) -> Self:
        # The default floor above a small memory_utilisation is no mistake: there is just no room for lower rungs.
        if "utilisation_floor" in self.model_fields_set and self.utilisation_floor > self.memory_utilisation:
            refuse(f"at most gpus.memory_utilisation, which is {self.memory_utilisation:g}", key="utilisation_floor")
        return self


class PatienceSettings(Table):
    """Seconds in which nothing may move, by phase."""

    boot: Duration = DEFAULT_PATIENCE_S[Phase.BOOT]
    distributed_init: Duration = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT]
    weights: Duration = DEFAULT_PATIENCE_S[Phase.WEIGHTS]
    compile: Duration = DEFAULT_PATIENCE_S[Phase.COMPILE]
    kv_cache: Duration = DEFAULT_PATIENCE_S[Phase.KV_CACHE]
    warm_up: Duration = DEFAULT_PATIENCE_S[Phase.WARM_UP]
    api: Duration = DEFAULT_PATIENCE_S[Phase.API]


class HeartbeatSettings(Table):
    """How patience follows what this host's own starts have needed, and what is looked at before a verdict."""

    learn: Switch = True
    learn_factor: Annotated[float, Field(ge=1.5, le=100), Expected("a number from 1.5 to 100")] = 5.0
    stacks: Switch = True


class ServingSettings(Table):
    """How a serving engine is watched: `deaths` within `deaths_window` are too many, and it steps down the ladder."""

    probe_interval: Duration = 10.0
    probe_timeout: Duration = 5.0
    failed_probes: Count = 3
    deaths: Count = 3
    deaths_window: Annotated[float, Field(ge=1, le=604800), Expected("seconds from 1 to 604800 (a week)")] = 600.0
    completion_timeout: Duration = 60.0


class RetrySettings(Table):
    """`attempts` is the ceiling of one struggle to come to service."""

    attempts: Count = 12
    crashes_per_rung: Count = 2
    backoff: Wait = 2.0
    backoff_ceiling: Wait = 60.0

    @model_validator(mode="after")
    def _ceiling_above_start(self) -> Self:
        if self.backoff_ceiling < self.backoff:
            refuse(f"at least retries.backoff, which is {self.backoff:g}", key="backoff_ceiling")
        return self


class StopSettings(Table):
    """`grace` is from SIGTERM to SIGKILL while serving, `kill_deadline` how long the killed may take to be gone."""

    grace: Wait = 20.0
    kill_deadline: Duration = 30.0


class RecordsSettings(Table):
    """The recordings of attempts: `keep` of them, 0 for none, and `max_size` MiB in all."""

    keep: Kept = 20
    max_size: Mebibytes = 200


class IncidentsSettings(RecordsSettings):
    """The same of the evidence of failed attempts."""

    max_size: Mebibytes = 100


class DaemonSettings(Table):
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Expected('"debug", "info", "warning" or "error"')
    ] = "info"
    runtime_dir: Annotated[
        Text, AfterValidator(_absolute), AfterValidator(_room_for_socket), Expected("an absolute path")
    ] = DEFAULT_RUNTIME_DIR
    state_dir: Annotated[Text, AfterValidator(_absolute), Expected("an absolute path")] = DEFAULT_STATE_DIR


class RungSettings(Table):
    """One `[[ladder]]` entry. `gpus` is how many of the GPUs to keep."""

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$"), Expected("a name of at most 40 of a-z, 0-9 and -")
    ]
    env: Environment = Field(default_factory=dict)
    args: Arguments = ()
    utilisation: Annotated[float | None, Field(gt=0, le=1), Expected("a fraction above 0 and up to 1")] = None
    gpus: Annotated[int | None, Field(ge=1, le=1024), Expected("an integer from 1 to 1024")] = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.name == ladder.BASE:
            refuse(f'another name: "{ladder.BASE}" is the config without any rung', key="name")
        if not (self.env or self.args or self.utilisation or self.gpus):
            refuse(sentence="changes nothing", hint="give it env, args, utilisation or gpus, or remove it")
        return self


def _names_once(rungs: tuple[RungSettings, ...]) -> tuple[RungSettings, ...]:
    twice = [name for name, count in Counter(rung.name for rung in rungs).items() if count > 1]
    if twice:
        names = ", ".join(f'"{name}"' for name in twice)
        refuse(sentence=f"two rungs are named {names}", hint="give each rung a name of its own")
    return rungs


class Config(Table):
    """Everything. `ladder` None is the built-in ladder, an empty one has no rungs below the base."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    gpus: GpuSettings = GpuSettings()
    patience: PatienceSettings = PatienceSettings()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    serving: ServingSettings = ServingSettings()
    retries: RetrySettings = RetrySettings()
    stop: StopSettings = StopSettings()
    records: RecordsSettings = RecordsSettings()
    incidents: IncidentsSettings = IncidentsSettings()
    daemon: DaemonSettings = DaemonSettings()
    ladder: Annotated[
        tuple[RungSettings, ...] | None, AfterValidator(_names_once), Expected("an array of tables", "a table")
    ] = None


def tables() -> dict[str, type[Table]]:
    """The config's tables by name; the ladder's entries too, as "ladder"."""
    found: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return {**found, "ladder": RungSettings}
