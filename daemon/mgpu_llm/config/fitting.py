"""Whether the configured model fits the GPUs of this host, in an operator's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.launching import tensor_parallel
from mgpu_llm.config.model import model_heads
from mgpu_llm.config.need import Known, broken_files, known
from mgpu_llm.config.parse import Loaded
from mgpu_llm.config.problem import ConfigProblem, quoted
from mgpu_llm.config.schema import Config
from mgpu_llm.core.fit import CUDA_PART, GIB, Fit, Need, changes, fits
from mgpu_llm.core.ladder import Heads, splits

EXPERT_PARALLEL: Final[options.Option] = ("--enable-expert-parallel", "-ep")
#: More ranks for one layer are proposed to nobody.
MOST_RANKS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The base against the one of its GPUs that decides. `known` is what is needed, or why nobody can tell."""

    known: Known | str
    tensor_parallel: int
    utilisation: float
    gpu_bytes: int

    @property
    def need(self) -> Need | None:
        return self.known.need if isinstance(self.known, Known) else None

    @property
    def fit(self) -> Fit | None:
        need = self.need
        return None if need is None else fits(need, self.tensor_parallel, self.utilisation, self.gpu_bytes)


def fitting(config: Config, environ: Mapping[str, str], gpu_bytes: Sequence[int]) -> Fitting | None:
    """`gpu_bytes` is what each GPU has, in the config's order; None where there are none, or one of them does not tell (0)."""
    ranks = tensor_parallel(config, len(gpu_bytes))
    if config.gpus.use == "none" or not gpu_bytes or not all(gpu_bytes) or not ranks:
        return None
    found = known(config, environ)
    stages = found.need.pipeline_parallel if isinstance(found, Known) else 1
    # vLLM takes the first of them. Where ranks may have unequal parts, the largest GPU may have the largest.
    taken = gpu_bytes[: ranks * stages]
    equal = stages == 1 and not options.has(config.engine.args, EXPERT_PARALLEL)
    return Fitting(
        known=found,
        tensor_parallel=ranks,
        utilisation=config.gpus.memory_utilisation,
        gpu_bytes=min(taken) if equal else max(taken),
    )


def weight_problems(loaded: Loaded, environ: Mapping[str, str]) -> Iterator[ConfigProblem]:
    """Weight files that are not whole: vLLM would find out after a minute, or while it reads them."""
    for broken in broken_files(loaded.config, environ):
        found = f"cannot read the weights {quoted(str(broken.file))}: {broken.why}"
        yield loaded.problem(("model", "path"), found, hint="fetch the model anew")


def fit_problems(loaded: Loaded, environ: Mapping[str, str], base: Fitting | None) -> Iterator[ConfigProblem]:
    """One where the model certainly does not fit."""
    config = loaded.config
    if base is None or base.need is None or base.fit is None or not base.fit.impossible:
        return
    hints = changes(
        base.need,
        base.tensor_parallel,
        base.utilisation,
        base.gpu_bytes,
        ceiling=config.gpus.utilisation_ceiling,
        sizes=larger(base.tensor_parallel, model_heads(config, environ)),
    )
    yield loaded.problem(("gpus", "use"), _why(base, base.need, base.fit), hint=" or ".join(hints[:2]))


def larger(ranks: int, heads: Heads) -> tuple[int, ...]:
    """Larger numbers of ranks that split the heads, smallest first: the powers of two where nobody knows the heads."""
    sizes = range(ranks + 1, MOST_RANKS + 1)
    if heads.attention is None:
        return tuple(size for size in sizes if size.bit_count() == 1)
    return tuple(size for size in sizes if splits(size, heads))


def lines(base: Fitting) -> tuple[str, ...]:
    """The estimate, in two or three lines."""
    if isinstance(base.known, str) or (fit := base.fit) is None:
        return (f"whether the model fits cannot be told beforehand: {base.known}",)
    stored = f"{_gib(base.known.stored_bytes)} in {_count(base.known.files, 'file')}"
    source = f"{stored}; {base.known.read_bytes} bytes of them were read" if base.known.files else "by its config.json"
    told = [
        f"about {_gib(fit.weights)} of weights on {_gpus(base, base.known.need)} ({source})",
        f"about {_gib(max(fit.left, 0))} of {_gib(round(base.gpu_bytes * CUDA_PART))} left for the cache "
        f"at utilisation {base.utilisation:g}, {_gib(fit.overhead)} for the work itself",
    ]
    if base.known.need.cache is not None:
        room = "" if fit.tokens is None else f"room for about {fit.tokens} tokens; "
        context = base.known.need.context
        told.append(
            room
            + ("vLLM chooses the context" if context is None else f"one request of {context} needs {_gib(fit.cache)}")
        )
    return tuple(told)


def remarks(base: Fitting, held_bytes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """What may go wrong and is no problem of the config. `held_bytes` is what others hold now of how much, by GPU in the
    config's order."""
    stages = base.need.pipeline_parallel if base.need is not None else 1
    for gpu, (used, has) in islice(held_bytes.items(), base.tensor_parallel * stages):
        total = has * CUDA_PART
        wanted = total * base.utilisation
        if total - used < wanted:
            yield (
                f"others hold {_gib(used)} of GPU {gpu}: {_gib(round(total - used))} are free, and vLLM does not start with "
                f"less than {_gib(round(wanted))} (utilisation {base.utilisation:g})"
            )
    fit = base.fit
    if fit is None or fit.impossible or not fit.tight:
        return
    if fit.left <= 0 or fit.cache > fit.left:
        yield (
            f"it may be tight: about {_gib(max(fit.left, 0))} are left for the cache, and it needs {_gib(fit.cache)} for one "
            "request"
        )
    else:
        yield (
            f"it may be tight: about {_gib(fit.beside)} are needed outside of utilisation {base.utilisation:g}, which leaves "
            f"{_gib(fit.outside)}"
        )


def _why(base: Fitting, need: Need, fit: Fit) -> str:
    parts = f"{_gib(fit.least_weights)} of weights"
    if fit.least_cache:
        tokens = "a block" if need.context is None else f"{need.context} tokens"
        parts += f" and {_gib(fit.least_cache)} of cache for {tokens}"
    there = f"there are {_gib(fit.room)}"
    if fit.room < base.gpu_bytes:
        there = f"{base.utilisation:g} of {_gib(base.gpu_bytes)} is {_gib(fit.room)}"
    return f"the model does not fit: it needs at least {parts} on {_gpus(base, need)}, and {there}"


def _gpus(base: Fitting, need: Need) -> str:
    number = base.tensor_parallel * need.pipeline_parallel
    return "its one GPU" if number == 1 else f"each of its {number} GPUs"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / GIB:.2g} GiB"
