from __future__ import annotations

import pytest

from mgpu_llm.core import remedies
from mgpu_llm.core.ladder import BASE, Heads, Ladder, Rung, smaller, splits
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import BY_DEFAULT, Area, Remedy

UNKNOWN = Heads()
SEVENTY = Heads(attention=64, key_value=8)
SEVEN = Heads(attention=28, key_value=4)
FOUR = Launch(gpus=("0", "1", "2", "3"), tensor_parallel=4, utilisation=0.9, env={"A": "1"}, args=("--x",))
LADDER = Ladder(base=FOUR, sizes=(2, 1), spares=("4",), context=8192, areas=frozenset(Area))


def rung(*parts: Remedy) -> Rung:
    found = BASE
    for part in parts:
        found = found.plus(part)
    return found


def test_a_rung_is_what_was_added_to_the_admins_own_settings() -> None:
    made = rung(remedies.P2P_OFF, remedies.utilisation(0.85, raises=False), remedies.gpus(("0", "1"), 2, FOUR))
    assert made.name == "p2p-off+utilisation-0.85+tp-2"
    assert LADDER.launch(made) == Launch(
        gpus=("0", "1"),
        tensor_parallel=2,
        utilisation=0.85,
        env={"A": "1", "NCCL_P2P_DISABLE": "1"},
        args=("--x", "--disable-custom-all-reduce"),
    )
    assert made.cost.count("; ") == 2
    assert (BASE.name, BASE.cost, LADDER.launch(BASE)) == ("base", "", FOUR)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (remedies.utilisation(0.85, raises=False), remedies.utilisation(0.8, raises=False)),
        (remedies.gpus(("0", "1"), 2, FOUR), remedies.gpus(("3",), 1, FOUR)),
        (remedies.context(4096), remedies.context(2048)),
    ],
)
def test_a_remedy_takes_the_place_of_one_that_sets_the_same(first: Remedy, second: Remedy) -> None:
    assert rung(first, remedies.EAGER, second).remedies == (remedies.EAGER, second)


def test_remedies_that_set_other_things_stay_and_so_do_the_admins_own() -> None:
    both = (remedies.CUSTOM_ALL_REDUCE_OFF, remedies.P2P_OFF)
    assert rung(*both).remedies == both
    own = (Remedy(name="a", utilisation=0.8), Remedy(name="b", utilisation=0.7))
    assert rung(*own).remedies == own
    assert LADDER.launch(rung(*own)).utilisation == 0.7


def test_fewer_ranks_without_gpus_are_only_fewer_ranks() -> None:
    on_cpu = Launch(gpus=None, tensor_parallel=2, utilisation=None)
    one = remedies.gpus(None, 1, on_cpu)
    assert (one.name, one.over(on_cpu)) == ("tp-1", Launch(gpus=None, tensor_parallel=1, utilisation=None))


def test_a_count_of_gpus_keeps_the_first_and_other_gpus_are_named() -> None:
    assert Remedy(name="mine", tensor_parallel=2).over(FOUR).gpus == ("0", "1")
    other = remedies.gpus(("0", "1", "2", "4"), 4, FOUR)
    assert (other.name, other.cost) == ("gpus-0,1,2,4", "none, where the GPUs are alike")
    assert other.over(FOUR).gpus == ("0", "1", "2", "4")


NAMES = (
    "base",
    *remedies.FIXED,
    "p2p-off+utilisation-0.85+gpus-0,3",
    "utilisation-0.95",
    "utilisation-0.875",
    "tp-2",
    "gpus-0,1,2,4+context-4096",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_back_to_its_rung(name: str) -> None:
    assert LADDER.rung(name).name == name
    assert Ladder(base=Launch(gpus=None, tensor_parallel=2, utilisation=None), sizes=(1,)).rung("tp-1").name == "tp-1"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nowhere",
        "p2p-off+",
        "utilisation-2.00",
        "utilisation-0.10",
        "eager+eager",
        "gpus-0,0",
        "context-0",
        "context-9000",
        "tp-3",
        "gpus-7",
        "gpus-0,1,2",
        "context-x",
        "tp-1\n",
    ],
)
def test_a_name_of_no_rung_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="there is no rung"):
        LADDER.rung(name)


def test_without_gpus_there_is_no_rung_of_their_memory() -> None:
    with pytest.raises(ValueError, match="there is no rung"):
        Ladder(base=Launch(gpus=None, tensor_parallel=2, utilisation=None)).rung("utilisation-0.80")


def test_a_rung_that_changes_what_must_not_be_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="changes what must not be changed: context-length"):
        Ladder(base=FOUR).rung("context-4096")
    with pytest.raises(ValueError, match="changes what must not be changed: transports"):
        Ladder(base=FOUR, areas=BY_DEFAULT - {Area.TRANSPORTS}).rung("p2p-off")


def test_the_admins_own_rungs_have_their_own_names_and_no_others() -> None:
    own = Ladder(base=FOUR, own=(Remedy(name="mine"), Remedy(name="other")))
    assert own.rung("mine+other").name == "mine+other"
    with pytest.raises(ValueError, match="there is no rung"):
        own.rung("p2p-off")


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "sizes"),
    [
        (8, SEVENTY, (4, 2, 1)),
        (8, UNKNOWN, (4, 2, 1)),
        (6, UNKNOWN, (3, 2, 1)),
        (4, SEVEN, (2, 1)),
        (7, Heads(attention=28), (4, 2, 1)),
        (16, SEVENTY, (8, 4, 2, 1)),
        (1, SEVENTY, ()),
    ],
)
def test_fewer_gpus_are_the_sizes_that_divide_the_heads(
    tensor_parallel: int, heads: Heads, sizes: tuple[int, ...]
) -> None:
    assert smaller(tensor_parallel, heads) == sizes


@pytest.mark.parametrize(
    ("tensor_parallel", "heads", "accepted"),
    [
        (3, SEVENTY, False),
        (16, SEVENTY, True),
        (4, SEVEN, True),
        (7, SEVEN, False),
        (7, Heads(attention=28), True),
        (3, Heads(key_value=4), False),
        (5, UNKNOWN, True),
    ],
)
def test_heads_are_split_evenly_and_key_value_heads_may_be_repeated(
    tensor_parallel: int, heads: Heads, accepted: bool
) -> None:
    assert splits(tensor_parallel, heads) is accepted
