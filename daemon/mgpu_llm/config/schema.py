"""The shape of the config: every key, its default, and the bounds within which it makes sense.

Durations are seconds, sizes of GPU memory are fractions of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mgpu_llm.config.fields import (
    Areas,
    Arguments,
    Count,
    Duration,
    Environment,
    Expected,
    Folder,
    Folders,
    Fraction,
    Kept,
    Listen,
    Mebibytes,
    SocketFolder,
    SpareGpus,
    Switch,
    Text,
    Tries,
    UsedGpus,
    Wait,
    Word,
    refuse,
)
from mgpu_llm.control_api import DEFAULT_RUNTIME_DIR, DEFAULT_STATE_DIR
from mgpu_llm.core import ladder
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.slices import ONE_SLICE, is_slice
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S

#: All instances of a host reach these, whatever their user and unit; not all of these may write in the first, and a container
#: may have either for itself.
DEFAULT_LOCK_DIRS: Final = ("/run/lock", "/dev/shm")  # noqa: S108 (the place itself is meant)


class Table(BaseModel):
    """Strict: an operator who writes a string where a number belongs is told, not guessed at."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Table):
    """What is served."""

    path: Annotated[Word, Expected("a string: a folder or a hub id")] = ""
    served_name: Annotated[Word, Expected("a string")] = ""


class EngineSettings(Table):
    """How vLLM is called and where it listens. `args` and `env` stay out of repr: they may hold an API key."""

    command: Annotated[tuple[Text, ...], Expected('an array of strings such as ["vllm", "serve"]', "a string")] = ()
    python: Annotated[Word, Expected("a string: the path of a Python")] = ""
    host: Annotated[Word, Expected("a string: an address or a host name")] = "127.0.0.1"
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
    """The GPUs and how the model is spread over them. `tensor_parallel` "auto" is the number of GPUs in use; `spares` may stand
    in for one of these that fails. Only where all say `shared` may several instances use a GPU; each holds its locks in all
    `lock_dirs` that it can use. Utilisation is lowered down to the floor and raised up to the ceiling."""

    use: UsedGpus = "all"
    spares: SpareGpus = ()
    shared: Switch = False
    lock_dirs: Folders = DEFAULT_LOCK_DIRS
    tensor_parallel: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=1024)], Expected('"auto" or an integer from 1 to 1024')
    ] = "auto"
    memory_utilisation: Fraction = 0.90
    utilisation_step: Annotated[float, Field(ge=0.01, lt=1), Expected("a fraction from 0.01 to below 1")] = 0.05
    utilisation_floor: Fraction = 0.70
    utilisation_ceiling: Fraction = 0.95

    @model_validator(mode="after")
    def _start_between_floor_and_ceiling(self) -> Self:
        # A default that memory_utilisation lies beyond is no mistake: there is just no room for rungs on that side.
        start, written = self.memory_utilisation, self.model_fields_set
        if "utilisation_floor" in written and self.utilisation_floor > start:
            refuse(f"at most gpus.memory_utilisation, which is {start:g}", key="utilisation_floor")
        if "utilisation_ceiling" in written and self.utilisation_ceiling < start:
            refuse(f"at least gpus.memory_utilisation, which is {start:g}", key="utilisation_ceiling")
        return self

    @model_validator(mode="after")
    def _spares_are_others(self) -> Self:
        if not self.spares:
            return self
        if isinstance(self.use, str):
            why = f'gpus.use = "{self.use}" leaves none beside it'
            refuse(key="spares", sentence=why, hint="write into gpus.use which GPUs to use, or remove the spares")
        if len(self.use) > 1 and any(is_slice(gpu) for gpu in self.spares):
            refuse("whole GPUs, as in gpus.use", key="spares", hint=ONE_SLICE)
        if both := [str(gpu) for gpu in self.spares if gpu in self.use]:
            refuse("GPUs that are not in gpus.use", key="spares", hint=f"remove {', '.join(both)}")
        return self


class PreflightSettings(Table):
    """Whether the GPUs are checked for a load: before it, or beside it until it comes to them. `deadline` is for all of it."""

    mode: Annotated[Literal["off", "before", "overlap"], Expected('"off", "before" or "overlap"')] = "overlap"
    deadline: Annotated[float, Field(ge=5, le=600), Expected("seconds from 5 to 600")] = 45.0
    remember: Switch = True


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
    """`attempts` is the ceiling of one struggle to come to service, `per_cause` that of those which fail for the same cause. A
    pause is longer by up to the part `jitter`."""

    attempts: Tries = 12
    per_cause: Tries = 8
    crashes_per_rung: Tries = 2
    backoff: Wait = 2.0
    backoff_ceiling: Wait = 60.0
    jitter: Annotated[float, Field(ge=0, le=1), Expected("a fraction from 0 to 1")] = 0.25

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


class MetricsSettings(Table):
    """Where metrics are served for Prometheus. Exporters have 9100 to 9999 among them, engines 8000 and what follows, and above
    32767 ports belong to outgoing connections."""

    listen: Listen = "127.0.0.1:19400"


class DaemonSettings(Table):
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Expected('"debug", "info", "warning" or "error"')
    ] = "info"
    runtime_dir: SocketFolder = DEFAULT_RUNTIME_DIR
    state_dir: Folder = DEFAULT_STATE_DIR


class RungSettings(Table):
    """One `[[ladder.rungs]]` entry. `gpus` is how many of the GPUs to keep."""

    name: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$"), Expected("a name of at most 40 of a-z, 0-9 and -")
    ]
    env: Environment = Field(default_factory=dict)
    args: Arguments = ()
    utilisation: Annotated[float | None, Field(gt=0, le=1), Expected("a fraction above 0 and up to 1")] = None
    gpus: Annotated[int | None, Field(ge=1, le=1024), Expected("an integer from 1 to 1024")] = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.name == ladder.BASE_NAME:
            refuse(f'another name: "{ladder.BASE_NAME}" is the config without any rung', key="name")
        if not (self.env or self.args or self.utilisation or self.gpus):
            refuse(sentence="changes nothing", hint="give it env, args, utilisation or gpus, or remove it")
        return self


def _names_once(rungs: tuple[RungSettings, ...]) -> tuple[RungSettings, ...]:
    twice = [name for name, count in Counter(rung.name for rung in rungs).items() if count > 1]
    if twice:
        names = ", ".join(f'"{name}"' for name in twice)
        refuse(sentence=f"two rungs are named {names}", hint="give each rung a name of its own")
    return rungs


class LadderSettings(Table):
    """What may be tried. `pin` is never changed, `may_change` is besides what may be by default; both are about the built-in
    remedies, which `rungs` replace: None is the built-in ones, () is never to change a setting. `retry_up_after` is a number of
    planned starts."""

    may_change: Areas = ()
    pin: Areas = ()
    remember: Switch = True
    retry_up_after: Kept = 10
    rungs: Annotated[
        tuple[RungSettings, ...] | None, AfterValidator(_names_once), Expected("an array of tables", "a table")
    ] = None

    @model_validator(mode="after")
    def _pinned_or_released(self) -> Self:
        if both := [area for area in dict.fromkeys(self.may_change) if area in self.pin]:
            refuse(key="may_change", sentence=f"ladder.pin has {', '.join(both)} too", hint="keep it in one of them")
        return self


class Config(Table):
    """Everything."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    gpus: GpuSettings = GpuSettings()
    preflight: PreflightSettings = PreflightSettings()
    patience: PatienceSettings = PatienceSettings()
    heartbeat: HeartbeatSettings = HeartbeatSettings()
    serving: ServingSettings = ServingSettings()
    retries: RetrySettings = RetrySettings()
    stop: StopSettings = StopSettings()
    records: RecordsSettings = RecordsSettings()
    incidents: IncidentsSettings = IncidentsSettings()
    metrics: MetricsSettings = MetricsSettings()
    daemon: DaemonSettings = DaemonSettings()
    ladder: LadderSettings = LadderSettings()


def tables() -> dict[str, type[Table]]:
    """The config's tables by name; "ladder.rungs" is each one of those."""
    found: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return {**found, "ladder.rungs": RungSettings}


def table_of(place: Sequence[str | int]) -> type[Table]:
    """The table that the key at a place stands in."""
    name = ".".join(part for part in place[:-1] if isinstance(part, str))
    return tables()[name] if name else Config
