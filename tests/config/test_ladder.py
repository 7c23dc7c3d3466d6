"""How far the ladder goes under a config, with a model and the GPUs of a host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.config.ladder import to_ladder
from mgpu_llm.config.launching import to_base_launch
from mgpu_llm.core.fit import Cache, Need
from mgpu_llm.core.ladder import Heads, Ladder, Nvlink
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Area
from mgpu_llm.core.sharding import Weights
from tests.config.loading import config

GPUS = ("0", "1", "2", "3")
HEADS = Heads(attention=8, key_value=8)
#: What one GPU has, and a model of 72 billion parameters in 16 bits with its cache, as config.json has it.
H200_BYTES = 150_754_820_096
WEIGHTS_BYTES = 145_400_000_000
CACHE = Cache(layers=80, heads=8, head_bytes=512)
NEED = Need(weights=Weights(least=WEIGHTS_BYTES, split=WEIGHTS_BYTES), cache=CACHE, context=32768, heads=8)


def under(text: str, gpus: tuple[str, ...] | None = GPUS) -> Ladder:
    settings = config(text)
    return to_ladder(settings, to_base_launch(settings, gpus), HEADS)


def with_need(text: str = "", need: Need | None = NEED, gpu: int = H200_BYTES) -> Ladder:
    settings = config(text)
    return to_ladder(settings, to_base_launch(settings, GPUS), HEADS, need=need, gpu_bytes=[gpu] * 4 if gpu else [])


def sizes(text: str = "", need: Need | None = NEED, gpu: int = H200_BYTES) -> tuple[tuple[int, ...], str]:
    found = with_need(text, need, gpu)
    return found.sizes, found.no_sizes


def test_what_the_config_leaves_alone_is_as_the_core_has_it() -> None:
    base = to_base_launch(config(""), GPUS)
    assert under("") == Ladder(base=base, sizes=(2, 1))


def test_what_is_known_of_the_model_and_the_gpus_is_handed_on() -> None:
    settings = config("gpus = { utilisation_step = 0.1, utilisation_floor = 0.5, utilisation_ceiling = 0.92 }")
    base = to_base_launch(settings, GPUS)
    found = to_ladder(settings, base, HEADS, context=8192, nvlink=Nvlink.ALL, spares=["7"])
    assert (found.step, found.floor, found.ceiling) == (0.1, 0.5, 0.92)
    assert (found.context, found.nvlink, found.spares) == (8192, Nvlink.ALL, ("7",))


@pytest.mark.parametrize(
    ("asked", "areas"),
    [
        ("", BY_DEFAULT),
        ("may_change = ['context-length']", BY_DEFAULT | {Area.CONTEXT_LENGTH}),
        ("may_change = ['gpus']", BY_DEFAULT),
        ("pin = ['gpus', 'dtype']", BY_DEFAULT - {Area.GPUS}),
        ("may_change = ['dtype'], pin = ['utilisation']", (BY_DEFAULT | {Area.DTYPE}) - {Area.UTILISATION}),
    ],
)
def test_what_is_released_comes_to_what_may_change_anyway_and_what_is_pinned_goes(
    asked: str, areas: frozenset[Area]
) -> None:
    assert under(f"ladder = {{ {asked} }}").areas == areas


def test_the_admins_own_rungs_replace_the_built_in_remedies() -> None:
    assert under("").own is None
    assert under("ladder.rungs = []").own == ()
    found = under("""
        [[ladder.rungs]]
        name = "mine"
        env = { A = "1" }
        args = ["-x"]
        utilisation = 0.5
        gpus = 1
        [[ladder.rungs]]
        name = "then"
        args = ["-y"]
    """)
    assert [remedy.name for remedy in found.own or ()] == ["mine", "then"]
    both = found.rung("mine+then")
    assert both.cost == "as set by the config; as set by the config"
    assert found.launch(both) == Launch(
        gpus=("0",), tensor_parallel=1, utilisation=0.5, env={"A": "1"}, args=("-x", "-y")
    )


def test_only_as_few_gpus_as_hold_the_weights_are_tried_and_why_not_fewer_is_said() -> None:
    at = "gpus.memory_utilisation ="
    assert sizes(f"{at} 0.9") == ((2,), "1 GPU does not hold 135.4 GiB of weights at utilisation 0.9")
    assert sizes(gpu=H200_BYTES // 4) == ((), "2 GPUs do not hold 135.4 GiB of weights at utilisation 0.9")
    assert sizes("gpus = { memory_utilisation = 0.99, utilisation_ceiling = 0.99 }", replace(NEED, context=1)) == (
        (2, 1),
        "",
    )


def test_the_cache_for_the_whole_context_must_find_room_too_unless_the_context_may_be_made_shorter() -> None:
    high = "gpus = { memory_utilisation = 0.97, utilisation_ceiling = 0.97 }"
    found = ((2,), "1 GPU does not hold 135.4 GiB of weights and the cache for 32768 tokens at utilisation 0.97")
    assert sizes(high) == found
    assert sizes(f"{high}\nladder.may_change = ['context-length']") == ((2, 1), "")


def test_each_number_of_gpus_has_a_utilisation_below_which_it_does_not_fit() -> None:
    whole = WEIGHTS_BYTES + 32768 * 80 * 8 * 512
    lowest = with_need("gpus.memory_utilisation = 0.9").lowest
    assert set(lowest) == {4, 2}
    assert lowest[2] == pytest.approx(whole / 2 / H200_BYTES, abs=1e-4)
    assert lowest[4] == pytest.approx(whole / 4 / H200_BYTES, abs=1e-4)
    assert lowest[2] <= whole / 2 / H200_BYTES
    guessed = replace(NEED, cache=replace(CACHE, certain=False))
    assert with_need("gpus.memory_utilisation = 0.9", guessed).lowest == {}


def test_of_unequal_gpus_the_largest_may_do_what_others_cannot() -> None:
    settings = config("gpus.memory_utilisation = 0.9")
    mixed = [H200_BYTES // 4, H200_BYTES, H200_BYTES // 4, H200_BYTES]
    found = to_ladder(settings, to_base_launch(settings, GPUS), HEADS, need=NEED, gpu_bytes=mixed)
    assert found.sizes == (2,)
    assert found.lowest[4] > 0.9 > found.lowest[2]


def test_where_need_or_gpus_are_not_known_every_size_is_tried() -> None:
    assert sizes(need=None) == ((2, 1), "")
    assert sizes(gpu=0) == ((2, 1), "")
    settings = config("gpus = { use = 'none', tensor_parallel = 2 }")
    found = to_ladder(settings, to_base_launch(settings, None), HEADS, need=NEED, gpu_bytes=[1])
    assert (found.sizes, found.no_sizes) == ((1,), "")


def test_one_rank_has_nothing_smaller() -> None:
    found = under("", gpus=("0",))
    assert (found.sizes, found.no_sizes) == ((), "")


@pytest.mark.parametrize(
    ("args", "times", "why"),
    [
        ("'-pp', '2'", 2, "pipeline parallelism sets the number of GPUs"),
        ("'--data-parallel-size=3'", 3, "data parallelism sets the number of GPUs"),
        (
            "'--prefill-context-parallel-size', '2', '-dp', '2'",
            4,
            "prefill context parallelism sets the number of GPUs",
        ),
        ("'-pp', '1'", 1, ""),
    ],
)
def test_ranks_that_are_multiplied_otherwise_keep_the_number_of_gpus(args: str, times: int, why: str) -> None:
    found = under(f"engine.args = [{args}]\ngpus.tensor_parallel = 2")
    assert (found.pipeline_parallel, found.sizes, found.no_sizes) == (times, () if why else (1,), why)


@pytest.mark.parametrize(
    ("args", "one_host"),
    [
        ("'--distributed-executor-backend', 'mp'", True),
        ("'--distributed-executor-backend=uni'", True),
        ("'--nnodes', '1', '-dpb', 'mp'", True),
        ("'--distributed-executor-backend', 'ray'", False),
        ("'--nnodes', '2'", False),
        ("'-dpb', 'ray'", False),
        ("'--data-parallel-address', '10.0.0.1'", False),
    ],
)
def test_where_other_hosts_may_take_part_the_number_of_gpus_stays(args: str, one_host: bool) -> None:
    found = under(f"engine.args = [{args}]")
    why = "" if one_host else "other hosts may take part, and have GPUs that nobody here knows"
    assert (found.one_host, found.sizes, found.no_sizes) == (one_host, (2, 1) if one_host else (), why)
