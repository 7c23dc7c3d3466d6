"""The engine's own language: what a line of vLLM's output says about the load.

The patterns hold for vLLM 0.8.4, 0.11.0, 0.20.2, 0.26.0 and 0.33.0 (read in their sources; the lines of 0.26.0 and 0.32.0
were also recorded from real starts). They search within the line, because prefixes, colours and source positions differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from mgpu_llm.core.effects import Level
from mgpu_llm.core.status import Count


class Phase(IntEnum):
    """The load's phases in their order. A load never goes back, so the highest one seen is where it is."""

    BOOT = 0
    DISTRIBUTED_INIT = 1
    WEIGHTS = 2
    COMPILE = 3
    KV_CACHE = 4
    WARM_UP = 5
    API = 6

    @property
    def label(self) -> str:
        """The phase's name in config, logs and status ("distributed-init")."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line taken apart: which process spoke ("" when it did not say), at what level, and the message itself."""

    process: str
    level: Level
    message: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a message establishes. All empty for a line that says nothing about the load.

    `bar` is any progress bar: what it counts, without what varies, and how far it has come, in its own steps.
    """

    phase: Phase | None = None
    shards: Count | None = None
    graphs: Count | None = None
    bar: tuple[str, int] | None = None
    serving: bool = False


_SPEAKER: Final = re.compile(r"^\s*\((?P<process>[A-Za-z][\w.-]*)(?: rank=\d+)? pid=\d+\) ?")
_LEVEL: Final = re.compile(
    r"^(?:\S+ )?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)"
    # Versions before 0.8 leave the opening bracket out.
    r"(?: \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\]|[\w./-]+:\d+\])|:\s{2,})[ ]?"
)
_LEVELS: Final = {
    "DEBUG": Level.DEBUG,
    "INFO": Level.INFO,
    "WARNING": Level.WARNING,
    "ERROR": Level.ERROR,
    "CRITICAL": Level.ERROR,
}
_ERROR_TEXT: Final = re.compile(
    r"^(?:\S+: )?(?:[A-Za-z_][\w.]*\.)?(?:[A-Z]\w*)?(?:Error|Exception)(?::|$)|^\S+(?: \S+)?: error: "
    # How pydantic words the errors of vLLM's own checks, on the line after its own "ValidationError: 1 validation error".
    r"|^(?:Value error|Assertion failed), "
)

# Counts have a bound: what prints more digits is no progress bar, and Python's int() refuses thousands of them.
_SHARDS: Final = re.compile(
    r"(?:Loading (?:safetensors|pt|np_cache) checkpoint shards|Multi-thread loading shards|Loading safetensors using \w+)"
    r"[^|]*\|\s*(?P<done>\d{1,9})/(?P<total>\d{1,9})(?!\d)"
)
_GRAPHS: Final = re.compile(
    r"Capturing (?:CUDA graph|cudagraph)[^%|]*%\|[^|]*\|\s*(?P<done>\d{1,9})/(?P<total>\d{1,9})(?!\d)"
)
#: What tqdm draws, whatever it counts: "DeepGEMM warmup:  34%|###4      | 12/35 [00:10<00:19]", or, as vLLM has its shards
#: drawn, "Loading safetensors checkpoint shards:  38% Completed | 3/8 [00:01<00:02]".
_BAR: Final = re.compile(
    r"^(?P<what>[^%|]{0,120}?):?\s*(?P<percent>\d{1,3})%(?:\|[^|]*| Completed )\|"
    r"\s*(?:(?P<done>\d{1,9})/\d{1,9}(?=[ ,\[]|$))?"
)
#: vLLM's own way to count (0.20 to 0.33): "Prefetching checkpoint files: 40% (4/10)".
_PERCENT: Final = re.compile(r"^(?P<what>[^%|]{0,120}?):\s*(?P<percent>\d{1,3})% \(\d{1,9}/\d{1,9}\)")
_SERVING: Final = re.compile(r"Application startup complete|Uvicorn running on")
#: Pattern -> the phase in which the engine is once it has said so.
_PHASES: Final = (
    (re.compile(r"vLLM API server version|non-default args:|Initializing a V[01] LLM engine \(v"), Phase.BOOT),
    (re.compile(r"world_size=\d+ rank=\d+ local_rank=|vLLM is using nccl=="), Phase.DISTRIBUTED_INIT),
    (re.compile(r"rank \d+ in world size \d+ is assigned as|Starting to load model |Loading model from scratch"), Phase.WEIGHTS),
    (
        re.compile(
            r"Model loading took [\d.]+ GiB|Dynamo bytecode transform time|Warming up model for the compilation"
            r"|cache directory: .* for vLLM's torch\.compile"
        ),
        Phase.COMPILE,
    ),
    (re.compile(r"Available KV cache memory"), Phase.KV_CACHE),
    (
        re.compile(
            r"(?:GPU|CPU) KV cache size: [\d,]+ tokens|Capturing (?:CUDA graph|cudagraph)|JIT kernel warmup starting"
            r"|Running FlashInfer autotune|Compiling CuTeDSL kernels|DeepG(?:EMM|emm).*warmup"
        ),
        Phase.WARM_UP,
    ),
    (re.compile(r"init engine \(profile, create kv cache, warmup model\) took|Starting vLLM (?:API )?server"), Phase.API),
)  # fmt: skip

#: Lines that a hung engine prints for ever: they say that somebody waits, never that something moves.
_CHATTER: Final = re.compile(
    r"No available shared memory broadcast block found|Waiting for \d+ local, \d+ remote core engine proc"
    r"|Waiting for WorkerProc to startup|Waiting for creating a placement group|[Ss]till waiting to acquire lock"
    r"|Avg prompt throughput|Engine \d+: .*throughput|\"GET /(?:health|metrics|ping|load|version)[ ?]"
)
#: Numbers, addresses, and whatever identifiers are made of hexadecimal digits.
_VARYING: Final = re.compile(r"0x[0-9a-fA-F]+|\b(?=[0-9a-f-]*\d)[0-9a-f]{6,}(?:-[0-9a-f]+)*\b|\d+")


def parse(text: str) -> Line:
    """Take one line apart. A line in no known form is a message at level info, or error when it reads like one."""
    rest, process = text, ""
    if speaker := _SPEAKER.match(text):
        process, rest = speaker["process"], text[speaker.end() :]
    if (form := _LEVEL.match(rest)) is not None:
        return Line(process=process, level=_LEVELS[form["level"]], message=rest[form.end() :])
    level = Level.ERROR if _ERROR_TEXT.search(rest) else Level.INFO
    return Line(process=process, level=level, message=rest)


def facts(message: str) -> Facts:
    """What the message establishes about the load."""
    bar = _bar(message)
    shards, graphs = _count(_SHARDS.search(message)), _count(_GRAPHS.search(message))
    if shards is not None:
        return Facts(phase=Phase.WEIGHTS, shards=shards, bar=bar)
    if graphs is not None:
        return Facts(phase=Phase.WARM_UP, graphs=graphs, bar=bar)
    if _SERVING.search(message):
        return Facts(phase=Phase.API, serving=True)
    for pattern, phase in _PHASES:
        if pattern.search(message):
            return Facts(phase=phase, bar=bar)
    return Facts(bar=bar)


def is_chatter(message: str) -> bool:
    """True for lines that tick on while nothing moves."""
    return _CHATTER.search(message) is not None


def wording(message: str) -> str:
    """The message without what varies from one repetition to the next (numbers, addresses)."""
    return _VARYING.sub("#", message[:300])


def is_error(line: Line) -> bool:
    """True for a line at level error, and for one that names an error whatever its level."""
    return line.level is Level.ERROR or names_an_error(line.message)


def names_an_error(message: str) -> bool:
    """True for the line that names an exception or a usage error, as opposed to the traceback around it."""
    return _ERROR_TEXT.search(message.strip()) is not None


def _count(match: re.Match[str] | None) -> Count | None:
    return None if match is None else Count(done=int(match["done"]), total=int(match["total"]))


def _bar(message: str) -> tuple[str, int] | None:
    match = _BAR.search(message) or _PERCENT.search(message)
    if match is None:
        return None
    groups, what = match.groupdict(), wording(match["what"].strip())
    done = groups.get("done")
    # The same bar may be drawn in items or, where they are no whole numbers ("1.9G/4.9G"), in percent: two bars to us.
    return (what, int(done)) if done else (f"{what} %", int(groups["percent"]))
