"""How far the ladder may change the settings, from the config and from what is known of the model and the GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import floor, prod

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.schema import Config, RungSettings
from mgpu_llm.core.fit import GIB, Need, fits, least_utilisation
from mgpu_llm.core.ladder import Heads, Ladder, Nvlink, smaller
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy


def to_ladder(
    config: Config,
    base: Launch,
    heads: Heads,
    *,
    need: Need | None = None,
    gpu_bytes: Sequence[int] = (),
    context: int | None = None,
    nvlink: Nvlink = Nvlink.NONE,
    spares: Sequence[str] = (),
) -> Ladder:
    """The ladder under the config. `need` is what the model needs, `gpu_bytes` what each of the base's GPUs has; None and ()
    where nobody knows. `spares` are entries of CUDA_VISIBLE_DEVICES, as the base's GPUs are."""
    args, gpus, asked, allowed = config.engine.args, config.gpus, config.ladder, areas(config)
    if need is not None and Area.CONTEXT_LENGTH in allowed:
        need = replace(need, context=None)  # a rung that lacks cache alone is a step to one with a shorter context
    sizes, no_sizes = _sizes(config, base, heads, need, gpu_bytes)
    return Ladder(
        base=base,
        areas=allowed,
        sizes=sizes,
        no_sizes=no_sizes,
        lowest=_lowest((base.tensor_parallel, *sizes), need, gpu_bytes),
        step=gpus.utilisation_step,
        floor=gpus.utilisation_floor,
        ceiling=gpus.utilisation_ceiling,
        nvlink=nvlink,
        spares=tuple(spares),
        context=context,
        one_host=options.one_host(args),
        pipeline_parallel=prod(options.multipliers(args).values()),
        own=None if asked.rungs is None else tuple(_own(asked.rungs)),
    )


def areas(config: Config) -> frozenset[Area]:
    """What the built-in remedies may change."""
    return BY_DEFAULT.union(config.ladder.may_change).difference(config.ladder.pin)


def _sizes(
    config: Config, base: Launch, heads: Heads, need: Need | None, gpu_bytes: Sequence[int]
) -> tuple[tuple[int, ...], str]:
    """The numbers of ranks to which it may go down, and why not to all that split the heads."""
    args = config.engine.args
    if not options.one_host(args):
        return (), "other hosts may take part, and have GPUs that nobody here knows"
    if times := options.multipliers(args):
        return (), f"{options.MULTIPLIERS[next(iter(times))]} sets the number of GPUs"
    sizes = smaller(base.tensor_parallel, heads)
    if need is None or not gpu_bytes or base.utilisation is None:
        return sizes, ""
    enough = tuple(
        size for size in sizes if not fits(need, size, base.utilisation, _smallest_of(size, gpu_bytes)).impossible
    )
    if len(enough) == len(sizes):
        return sizes, ""
    return enough, _not_held(need, next(size for size in sizes if size not in enough), base.utilisation, gpu_bytes)


def _smallest_of(size: int, gpu_bytes: Sequence[int]) -> int:
    """Of so many of the GPUs, where the largest are taken: others than the first may be left to be tried."""
    return sorted(gpu_bytes, reverse=True)[min(size, len(gpu_bytes)) - 1]


def _not_held(need: Need, size: int, utilisation: float, gpu_bytes: Sequence[int]) -> str:
    fit = fits(need, size, utilisation, _smallest_of(size, gpu_bytes))
    held = f"{need.weights.least / GIB:.1f} GiB of weights"
    if need.context is not None and fit.least_weights <= fit.room:
        held += f" and the cache for {need.context} tokens"
    hold = "GPU does not hold" if size == 1 else "GPUs do not hold"
    return f"{size} {hold} {held} at utilisation {utilisation:g}"


def _lowest(sizes: Sequence[int], need: Need | None, gpu_bytes: Sequence[int]) -> dict[int, float]:
    if need is None or not gpu_bytes:
        return {}
    ranks = {size: size * need.pipeline_parallel for size in sizes}
    found = {size: least_utilisation(need, size, _smallest_of(ranks[size], gpu_bytes)) for size in sizes}
    return {size: floor(value * 10_000) / 10_000 for size, value in found.items() if value > 0}


def _own(rungs: Sequence[RungSettings]) -> Iterator[Remedy]:
    for rung in rungs:
        yield Remedy(
            name=rung.name,
            cost="as set by the config",
            env=rung.env,
            args=rung.args,
            utilisation=rung.utilisation,
            tensor_parallel=rung.gpus,
        )
