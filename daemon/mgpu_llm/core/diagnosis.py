"""Why an attempt ended, with the evidence, and what may cure it."""

from __future__ import annotations

import re
import signal as _signals
from dataclasses import dataclass
from typing import Final

from mgpu_llm.core import engine_log
from mgpu_llm.core.engine_log import Line, Phase
from mgpu_llm.core.ladder import Kind
from mgpu_llm.core.stall import Stalled

#: Every rung of the built-in ladder, in its default order: for causes that do not point to one of them.
ANY_RUNG: Final = frozenset({Kind.TRANSPORT, Kind.MEMORY, Kind.GPUS})
NO_RUNG: Final[frozenset[Kind]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why an attempt ended. `outcome`: stalled, crashed, refused or died (while serving).

    `cures` are the kinds of rungs that may help; `plain_retries` is how often the same rung is worth another try
    first; `hopeless` means that no retry can help until somebody changes something.
    """

    cause: str
    outcome: str
    summary: str
    advice: str
    evidence: tuple[str, ...] = ()
    cures: frozenset[Kind] = ANY_RUNG
    plain_retries: int = 0
    hopeless: bool = False


@dataclass(frozen=True, kw_only=True)
class _Signature:
    """What the engine says when it fails for this cause. The summary may use the pattern's named groups."""

    cause: str
    pattern: re.Pattern[str]
    summary: str
    advice: str
    cures: frozenset[Kind] = NO_RUNG
    plain_retries: int = 0
    hopeless: bool = False


_SIGNATURES: Final = (
    _Signature(
        cause="gpu-not-free",
        pattern=re.compile(
            r"Free memory on device (?:\S+ )?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than desired"
            r" GPU memory utilization \((?P<asked>[\d.]+)"
        ),
        summary="GPU memory is not free: {free} of {total} GiB, less than utilisation {asked} asks for",
        advice="end the process that holds the GPU (nvidia-smi names it), or lower gpus.memory_utilisation",
        cures=frozenset({Kind.MEMORY}),
        plain_retries=2,
    ),
    _Signature(
        cause="no-kv-memory",
        pattern=re.compile(r"No available memory for the cache blocks|larger than the available KV cache memory"),
        summary="no GPU memory is left for the KV cache once the weights are loaded",
        advice="raise gpus.memory_utilisation, add GPUs, or lower --max-model-len in engine.args",
        hopeless=True,
    ),
    _Signature(
        cause="cuda-out-of-memory",
        pattern=re.compile(r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError"),
        summary="CUDA ran out of memory",
        advice="lower gpus.memory_utilisation; if the weights themselves do not fit, add GPUs or use a quantised model",
        cures=frozenset({Kind.MEMORY}),
    ),
    _Signature(
        cause="port-in-use",
        pattern=re.compile(r"\[Errno 98\]|Address already in use"),
        summary="the port is in use",
        advice="stop the other server, or choose another engine.port",
        plain_retries=1,
    ),
    _Signature(
        cause="bad-arguments",
        pattern=re.compile(
            r"error: (?P<what>unrecognized arguments: .*|argument .*|ambiguous option: .*"
            r"|the following arguments are required: .*)"
        ),
        summary="vLLM refused its arguments: {what}",
        advice="correct engine.args (this vLLM's own list: vllm serve --help=all)",
        hopeless=True,
    ),
    _Signature(
        cause="model-not-found",
        pattern=re.compile(
            r"Repo id must be in the form|Repository Not Found|RepositoryNotFoundError"
            r"|is not a local folder and is not a valid model identifier|Invalid repository ID or local directory"
            r"|LocalEntryNotFoundError|OfflineModeIsEnabled"
            r"|Cannot find any model weights with"
        ),
        summary="the model cannot be found",
        advice="check model.path: a folder with config.json and weights, or the id of a model this host can download",
        hopeless=True,
    ),
    _Signature(
        cause="model-files-damaged",
        pattern=re.compile(r"SafetensorError: .*|Weight files referenced in index but missing|invalid load key"),
        summary="the model's files are damaged or incomplete",
        advice="download the model again (a git-lfs pointer or a cut-off shard looks like this)",
        hopeless=True,
    ),
    _Signature(
        cause="model-refused",
        pattern=re.compile(
            r"Total number of attention heads \(\d+\) must be divisible by tensor parallel size"
            r"|User-specified max_model_len \(\d+\) is greater than|Model architectures \[.*\] are not supported"
            r"|contains custom code which must be executed|`trust_remote_code=True`|Bfloat16 is only supported on GPUs"
        ),
        summary="vLLM refuses this model with these settings",
        advice="change the setting that the engine names",
        hopeless=True,
    ),
    _Signature(
        cause="driver",
        pattern=re.compile(
            r"Error 802: system not yet initialized|NVIDIA driver on your system is too old"
            r"|CUDA driver version is insufficient|no kernel image is available for execution"
        ),
        summary="the NVIDIA driver or its services cannot run this engine",
        advice="bring driver, CUDA and nvidia-fabricmanager to versions that belong together; no setting helps",
        hopeless=True,
    ),
)  # fmt: skip

#: Lines that only say that something failed elsewhere; they never are the cause.
_CASCADE: Final = re.compile(
    r"Engine core initialization failed|WorkerProc (?:failed to start|initialization failed)|EngineDeadError"
    r"|EngineCore (?:failed to start|encountered a fatal error)|cancelled|died unexpectedly"
)
#: Some versions of vLLM ask the hub about a model although it is a local folder, print the refusal as an error, and go on.
_HARMLESS: Final = re.compile(r"^Error retrieving ")
#: Before distributed init is over, no memory has been set aside: only what the GPUs say to each other can be at fault.
_STALL_CURES: Final = {Phase.DISTRIBUTED_INIT: frozenset({Kind.TRANSPORT, Kind.GPUS})}
_STALL_ADVICE: Final = {
    Phase.BOOT: "the engine hangs before it reaches the GPUs: look at imports on a slow or hung file system",
    Phase.DISTRIBUTED_INIT: (
        "NCCL peer-to-peer that the hardware breaks is the usual cause: PCIe ACS or an IOMMU in translated mode; "
        "as a lasting cure set iommu=pt or switch ACS off, and check one GPU first, then pairs"
    ),
    Phase.WEIGHTS: "the weights stopped coming: look at the disk or network file system that holds the model",
    Phase.COMPILE: "compilation or profiling hangs: try --enforce-eager in engine.args",
    Phase.KV_CACHE: "the KV cache could not be set up: lower gpus.memory_utilisation",
    Phase.WARM_UP: "warm-up or graph capture hangs: vLLM's custom all-reduce over broken peer access is a usual cause",
    Phase.API: "the server is up but no completion comes back",
}


@dataclass(frozen=True, kw_only=True)
class Clue:
    """What the engine's own words gave away: the first root cause named, and the first error line."""

    cause: str = ""
    line: str = ""
    error: str = ""


def look(clue: Clue, line: Line) -> Clue:
    """Add one line to what is known. Only errors count: warnings name the same causes and are survived. The first root
    cause stands: what follows it is its consequence."""
    message = line.message
    if not engine_log.is_error(line) or _HARMLESS.match(message):
        return clue
    if not clue.cause:
        for signature in _SIGNATURES:
            if signature.pattern.search(message):
                return Clue(cause=signature.cause, line=message.strip(), error=clue.error or message.strip())
    if not clue.error and engine_log.names_an_error(message) and not _CASCADE.search(message):
        return Clue(cause=clue.cause, line=clue.line, error=message.strip())
    return clue


def of_stall(stalled: Stalled, clue: Clue) -> Diagnosis:
    """Nothing moves any more. A cause that the engine named explains more than the silence after it, unless it says that
    nothing can help: then the engine would have ended."""
    if (named := _named(clue)) is not None and not named.hopeless:
        return named
    phase = stalled.phase.label
    evidence = (*stalled.evidence, *([f'error before: "{clue.error}"'] if clue.error else []))
    quiet = f"stalled in {phase}: nothing moved for {stalled.idle_s:.0f} s"
    if found := _stall_of_its_own(stalled):
        cause, why, advice = found
        # No rung changes what it waits for. That the engine ends may: a lock's holder may be among those that go.
        return Diagnosis(
            cause=cause,
            outcome="stalled",
            summary=f"{quiet}, {why}",
            advice=advice,
            evidence=evidence,
            cures=NO_RUNG,
            plain_retries=1,
        )
    spinning = {True: ", while something spins", False: "", None: ""}[stalled.spinning]
    return Diagnosis(
        cause=f"stalled-in-{phase}",
        outcome="stalled",
        summary=f"{quiet}{spinning}",
        advice=_STALL_ADVICE[stalled.phase],
        evidence=evidence,
        cures=_STALL_CURES.get(stalled.phase, ANY_RUNG),
    )


def _stall_of_its_own(stalled: Stalled) -> tuple[str, str, str] | None:
    """The cause, what is seen and what to do, where the stall explains itself; None where it does not."""
    if stalled.stopped:
        who = ", ".join(stalled.stopped)
        return (
            "process-stopped",
            f"stopped by a signal: {who}",
            "find out who sends SIGSTOP (a debugger, a job control, a freezer); kill -CONT continues a process",
        )
    if stalled.lock_waits:
        return (
            "stale-lock",
            f"waiting for a lock file while nothing compiles: {', '.join(stalled.lock_waits)}",
            "a killed process left its lock: with no engine running, delete the files *.lock and lock below the caches of "
            "flashinfer, torch_extensions, torchinductor, triton and the hub (.locks)",
        )
    if stalled.thrashing:
        return (
            "memory-pressure",
            stalled.thrashing,
            "the host is out of memory: end what else uses it, add memory, or load with fewer workers",
        )
    if stalled.storage_waits and stalled.phase in (Phase.BOOT, Phase.WEIGHTS):
        return (
            "storage-silent",
            f"waiting for storage that delivers not one byte: {', '.join(stalled.storage_waits)}",
            "look at the disk or the network file system that holds the model and Python (dmesg, mount, the server's side)",
        )
    return None


def of_exit(status: int, phase: Phase, clue: Clue, *, retries: int) -> Diagnosis:
    """The engine ended by itself while loading, with `status` as subprocess gives it."""
    if named := _named(clue):
        return named
    how = describe_status(status)
    error = f": {clue.error}" if clue.error else ""
    return Diagnosis(
        cause="engine-exited",
        outcome="crashed",
        summary=f"the engine ended in {phase.label} with {how}{error}",
        advice="read the engine's last lines (mgpuctl logs)",
        evidence=(f'error: "{clue.error}"',) if clue.error else (),
        plain_retries=retries,
    )


def of_death(what: str, clue: Clue) -> Diagnosis:
    """A serving engine died or stopped answering; `what` says which. `clue` is from its last words."""
    named = _named(clue)
    return Diagnosis(
        cause=named.cause if named else "died-while-serving",
        outcome="died",
        summary=what + (f": {clue.error}" if clue.error else ""),
        advice=named.advice
        if named
        else "read the engine's last lines (mgpuctl logs) and the kernel's log for Xid errors",
        evidence=(f'error: "{clue.error}"',) if clue.error else (),
        cures=named.cures if named and named.cures else ANY_RUNG,
    )


def of_spawn(reason: str, *, hopeless: bool) -> Diagnosis:
    """No engine came to be."""
    return Diagnosis(
        cause="cannot-spawn",
        outcome="crashed",
        summary=reason,
        advice="correct what it names: engine.command, engine.python or engine.port",
        cures=NO_RUNG,
        plain_retries=0 if hopeless else 2,
        hopeless=hopeless,
    )


def of_refused_completion(detail: str) -> Diagnosis:
    """The server is up and says that it will never answer our one-token request."""
    return Diagnosis(
        cause="completion-refused",
        outcome="refused",
        summary=f"the server refuses a one-token request: {detail}",
        advice="check model.served_name and the API key in engine.args or engine.env",
        cures=NO_RUNG,
        hopeless=True,
    )


def describe_status(status: int) -> str:
    """A process's end in words: "exit code 1", "signal 9 (SIGKILL)"."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {-status} ({_signals.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


def _named(clue: Clue) -> Diagnosis | None:
    signature = next((row for row in _SIGNATURES if row.cause == clue.cause), None)
    if signature is None:
        return None
    match = signature.pattern.search(clue.line)
    words = match.groupdict() if match else {}
    return Diagnosis(
        cause=signature.cause,
        outcome="refused" if signature.hopeless else "crashed",
        summary=signature.summary.format(**words),
        advice=signature.advice,
        evidence=(f'the engine said: "{clue.line[:300]}"',),
        cures=signature.cures,
        plain_retries=signature.plain_retries,
        hopeless=signature.hopeless,
    )
