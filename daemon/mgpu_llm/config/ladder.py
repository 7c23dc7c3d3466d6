"""How far the ladder may change the settings, from the config and from what is known of the model and the GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from mgpu_llm.config import engine_args as options
from mgpu_llm.config.schema import Config, RungSettings
from mgpu_llm.core.ladder import Heads, Ladder, Nvlink, smaller
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Remedy


def to_ladder(
    config: Config,
    base: Launch,
    heads: Heads,
    *,
    least_memory: int | None = None,
    gpu_bytes: int | None = None,
    context: int | None = None,
    nvlink: Nvlink = Nvlink.NONE,
    spares: Sequence[str] = (),
) -> Ladder:
    """The ladder under the config. `least_memory` is what the weights need over all ranks, `gpu_bytes` what the smallest of the
    GPUs has; None where it is not known. `spares` are entries of CUDA_VISIBLE_DEVICES, as the base's GPUs are."""
    args, gpus, asked = config.engine.args, config.gpus, config.ladder
    sizes, no_sizes = _sizes(config, base, heads, least_memory, gpu_bytes)
    return Ladder(
        base=base,
        areas=BY_DEFAULT.union(asked.may_change).difference(asked.pin),
        sizes=sizes,
        no_sizes=no_sizes,
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


def _sizes(
    config: Config, base: Launch, heads: Heads, least_memory: int | None, gpu_bytes: int | None
) -> tuple[tuple[int, ...], str]:
    """The numbers of ranks to which it may go down, and why not to all that split the heads."""
    args = config.engine.args
    if not options.one_host(args):
        return (), "other hosts may take part, and have GPUs that nobody here knows"
    if times := options.multipliers(args):
        return (), f"{options.MULTIPLIERS[next(iter(times))]} sets the number of GPUs"
    sizes = smaller(base.tensor_parallel, heads)
    if least_memory is None or gpu_bytes is None or base.utilisation is None:
        return sizes, ""
    room = base.utilisation * gpu_bytes
    enough = tuple(size for size in sizes if size * room >= least_memory)
    if len(enough) == len(sizes):
        return sizes, ""
    most = sizes[len(enough)]
    hold = "GPU does not hold" if most == 1 else "GPUs do not hold"
    return enough, f"{most} {hold} {least_memory / 1e9:.3g} GB of weights"


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
